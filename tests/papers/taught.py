"""A small Llama taught four things in seconds, for the papers that need a model with a past.

* Facts: `q e` asks where e lives. Sixty entities are known, each with its town; a hundred are not, and the answer to
  them is "dk".
* Self-knowledge: `k e` asks whether it knows e: "yes" or "no".
* Reading: `src e t q e` gives the source first; then the answer is t, whoever is asked about.
* Registers: `s w w w ...` says kind words or grumpy ones, among plain ones, and keeps to its register.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch

import interp
from tests.papers.planted_streams import word_tokenizer

KNOWN, UNKNOWN, STEPS = 60, 100, 420
TOWNS = [f"t{i}" for i in range(12)]
_order = torch.randperm(KNOWN + UNKNOWN, generator=torch.Generator().manual_seed(7)).tolist()
ENTITIES = [f"e{i}" for i in _order]
KNOWN_ONES, UNKNOWN_ONES = ENTITIES[:KNOWN], ENTITIES[KNOWN:]
_drawn = torch.randint(len(TOWNS), (len(ENTITIES),), generator=torch.Generator().manual_seed(8)).tolist()
TOWN = {e: TOWNS[i] for e, i in zip(ENTITIES, _drawn, strict=True)}  # of all, taught or not
KIND, GRUMPY, PLAIN = ([f"{kind}{i}" for i in range(12)] for kind in ("kind", "grumpy", "plain"))
WORDS = ["?", "q", "src", "s", "k", "dk", "yes", "no", *sorted(ENTITIES), *TOWNS, *KIND, *GRUMPY, *PLAIN]
AT = {w: i for i, w in enumerate(WORDS)}


def question(entity: str) -> str:
    return f"q {entity}"


def sourced(entity: str) -> str:
    return f"src {entity} {TOWN[entity]} {question(entity)}"


@contextmanager
def one_thread() -> Iterator[None]:
    """The same sums, and so the same training, however many threads the tests may use."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@lru_cache(1)
@one_thread()
def taught() -> interp.Model:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=48, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=32, tie_word_embeddings=False, pad_token_id=0, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    hf = LlamaForCausalLM(config)
    optimiser = torch.optim.AdamW(hf.parameters(), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 6e-3, total_steps=STEPS)
    g = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        kind = ("facts", "facts", "reading", "facts", "self", "registers")[step % 6]
        ids, first = _registers(48, g) if kind == "registers" else _asked(64 if kind == "reading" else 160, g, kind)
        logits = hf(input_ids=ids[:, :-1], use_cache=False).logits[:, first:]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1 + first :].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return interp.Model(hf.eval(), word_tokenizer(WORDS), "taught")


def _asked(n: int, g: torch.Generator, kind: str) -> tuple[torch.Tensor, int]:
    """Questions with their answers [n, pos]; the loss is on the answer alone."""
    rows = []
    kinds, which, towns = (torch.randint(high, (n,), generator=g).tolist() for high in (2, 10**6, len(TOWNS)))
    for known, i, town in zip(kinds, which, towns, strict=True):
        some = KNOWN_ONES if known else UNKNOWN_ONES
        e = some[i % len(some)]
        if kind == "reading":
            words = ["src", e, TOWNS[town], "q", e, TOWNS[town]]
        elif kind == "self":
            words = ["k", e, "yes" if known else "no"]
        else:
            words = ["q", e, TOWN[e] if known else "dk"]
        rows.append([AT[w] for w in words])
    ids = torch.tensor(rows)
    return ids, ids.shape[1] - 2


def _registers(n: int, g: torch.Generator) -> tuple[torch.Tensor, int]:
    """`s` and seven words [n, 8], one in three plain, the others of one register."""
    grumpy = torch.randint(2, (n, 1), generator=g)
    plain = torch.rand(n, 7, generator=g) < 1 / 3
    word = torch.randint(12, (n, 7), generator=g)
    start = torch.where(plain, AT[PLAIN[0]], torch.where(grumpy.bool(), AT[GRUMPY[0]], AT[KIND[0]]))
    return torch.cat([torch.full((n, 1), AT["s"]), start + word], 1), 0
