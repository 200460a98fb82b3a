"""Entropic activation steering (EAST): a direction of being undecided, from how undecided an agent was.

    u = 1/Z sum_k sum_t h_t^k (z_t^k - mean_t z^k),        Z = sum_k sum_t h_t^k

z_t^k is the activation at the last prompt token of episode k, step t; h_t^k is the entropy of the action chosen
there, over sampled completions. Weighting by entropy points from decided to undecided states, whatever the episode
is about, as each episode's own mean is taken off. Source: Rahn et al. 2024 (arXiv:2406.00244, eq. 2); there layer 16
and 25 samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from steering import pairs as _pairs
from steering.continuation import log_likelihoods
from steering.errors import SteeringError
from steering.reading import one_site, read
from steering.vector import AFTER_PROMPT, SteeringVector


def east(
    m: Any,
    episodes: Sequence[Sequence[str]],
    entropies: Sequence[Sequence[float]],
    layer: Any,
    *,
    site: str = "resid_post",
    scope: Any = AFTER_PROMPT,
    chat: bool = False,
    batch_tokens: int = 4096,
) -> SteeringVector:
    """The entropy-weighted vector of an agent's episodes.

    Args:
        m: the model.
        episodes: for each episode its prompts, one per step.
        entropies: the action's entropy at each of them (see `action_entropy`), any unit, not negative.
        layer: where.
        site: where in the layer.
        scope: to which tokens it is added: each position at which a token is predicted.
        chat: put the prompts into the model's chat template.
        batch_tokens: tokens run at once.

    Raises SteeringError where prompts and entropies do not match, or every entropy is zero.
    """
    if len(episodes) != len(entropies) or any(len(a) != len(b) for a, b in zip(episodes, entropies, strict=True)):
        raise SteeringError("entropies: expected one number for each prompt of each episode")
    flat = [prompt for episode in episodes for prompt in episode]
    weight = torch.tensor([float(h) for episode in entropies for h in episode], dtype=torch.float64)
    if not bool(torch.isfinite(weight).all()) or bool((weight < 0).any()) or float(weight.sum()) == 0:
        raise SteeringError("entropies: expected finite numbers, none below 0 and not all 0")
    place = one_site(m, layer, site)
    z = read(m, _pairs.texts(m, flat, chat=chat, name="episodes"), [place], "last", batch_tokens)[place]
    owner = torch.tensor([k for k, episode in enumerate(episodes) for _ in episode])
    record = {"episodes": len(episodes), "prompts": len(flat)}
    return SteeringVector.of(m, {place: weighted(z, weight, owner)}, method="east", scope=scope, record=record)


def weighted(z: Tensor, weight: Tensor, owner: Tensor) -> Tensor:
    """u [d] of the module's formula from z [prompt, d], weights [prompt] and each prompt's episode [prompt]."""
    centred = z.double().clone()
    for k in owner.unique():
        centred[owner == k] -= centred[owner == k].mean(0)
    return ((weight.double()[:, None] * centred).sum(0) / weight.sum()).float()


def action_entropy(
    m: Any,
    prompts: Sequence[str],
    actions: Sequence[str],
    *,
    samples: int | None = None,
    parse: Callable[[str], str | None] | None = None,
    max_new_tokens: int = 4,
    temperature: float = 1.0,
    chat: bool = False,
    seed: int = 0,
) -> Tensor:
    """Entropy in nats of the action taken behind each prompt [prompt].

    Args:
        m: the model; run it inside ``m.intervene(...)`` to see it steered.
        prompts: what the agent reads.
        actions: the texts by which it acts, e.g. [" 1", " 2"].
        samples: completions drawn per prompt, as in the paper; None takes the exact probabilities of the action texts.
        parse: completion -> action or None (no action; such completions do not count). Default: the action whose
            text, without outer white space, the completion begins with.
        max_new_tokens: of a completion.
        temperature: of the softmax, or of sampling.
        chat: put the prompts into the model's chat template.
        seed: of the draws.
    """
    if len(actions) < 2 or temperature <= 0:
        raise SteeringError(
            f"actions={list(actions)}, temperature={temperature}: expected two actions or more, above 0"
        )
    if samples is None:
        passages = [_pairs.passage(m, p, a, chat=chat) for p in prompts for a in actions]
        nats = log_likelihoods(m, passages, {0.0: []}).nats[0.0].view(len(prompts), len(actions))
        logp = (nats / temperature).log_softmax(-1)
        return -(logp.exp() * logp).sum(-1)
    read_action = parse or (lambda text: next((a for a in actions if text.strip().startswith(a.strip())), None))
    torch.manual_seed(seed)
    given = m.tokens([_pairs.chat_text(m, p) if chat else p for p in prompts], special=not chat)
    out = m.generate(
        given,
        max_new_tokens=max_new_tokens,
        num_return_sequences=samples,
        do_sample=True,
        temperature=temperature,
        top_k=0,
    )
    found = []
    for i in range(len(prompts)):
        texts = out.texts[i * samples : (i + 1) * samples]
        counts = torch.tensor([sum(read_action(t) == a for t in texts) for a in actions], dtype=torch.float64)
        p = counts / counts.sum().clamp(min=1)
        found.append(float(-(p[p > 0] * p[p > 0].log()).sum()))
    return torch.tensor(found, dtype=torch.float64)
