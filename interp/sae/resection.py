"""What it costs to take a label's features out, at equal damage: experts, latents, neurons side by side.

    done = resection(m, {"sae": s.ablate, "experts": lambda ids: experts.ablate(experts.ExpertSet(m, {3: ids}))},
                     chosen, test_texts, sizes=(8, 32, 128), alive=living)
    done.curve()              damage, spill and selectivity by number of features
    done.at_damage(0.05)      the same at one common damage, with intervals

`chosen` names, by kind of feature and label, the features that tell the label best on other texts (`versus.compare`
puts them into ``.attrs["chosen"]``). **Damage** is the rise of the label's own loss in nats per token, **spill** the
mean absolute change of the other labels', both averaged over the labels that are removed in turn, and **selectivity**
is damage / spill (Monet, arXiv:2412.04139, section 5, whose question this is). One expert is a small thing and one
latent a large one, so numbers of features are no common measure; damage is. Random living features of each kind go
through the same (``baseline="random"``): theirs is the selectivity that chance has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interp.bridges.sae_lens import SAEError
from interp.hooks import resume
from interp.progress import bar

if TYPE_CHECKING:
    import pandas as pd

    from interp.model import Model

#: Features of one kind -> what switches them off: an edit, or a list of edits.
Off = Callable[[list[int]], Any]


@dataclass(frozen=True, eq=False)
class Removals:
    """Losses of every text under every removal.

    Attributes:
        kinds: (method, baseline) of each row of `after`.
        removed: labels that were removed in turn.
        sizes: numbers of features, ascending.
        labels: label of each text [text].
        tokens: predicted tokens of each text [text].
        clean: nats of each text, nothing removed [text].
        after: nats [kind, removed, size, text].
    """

    kinds: list[tuple[str, str]]
    removed: list[str]
    sizes: list[int]
    labels: list[str]
    tokens: Tensor
    clean: Tensor
    after: Tensor
    about: dict[str, Any]

    def _changes(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """(damage, spill) [kind, size], each text counted `times` [text]; a leading 0 for nothing removed."""
        names = list(dict.fromkeys(self.labels))
        of = torch.tensor([names.index(label) for label in self.labels])
        member = torch.nn.functional.one_hot(of, len(names)).double() * times[:, None]
        change = (self.after - self.clean) @ member / (self.tokens @ member)  # [kind, removed, size, label]
        damage, spill = [], []
        for i, label in enumerate(self.removed):
            own = names.index(label)
            damage.append(change[:, i, :, own])
            others = [j for j in range(len(names)) if j != own]
            spill.append(change[:, i][..., others].abs().nanmean(-1))
        pad = torch.nn.functional.pad
        return pad(torch.stack(damage).nanmean(0), (1, 0)), pad(torch.stack(spill).nanmean(0), (1, 0))

    def _draws(self, resamples: int, seed: int) -> list[Tensor]:
        """How often each text is drawn: within its label, so that none is without text."""
        g, out = torch.Generator().manual_seed(seed), []
        rows = [torch.tensor([i for i, have in enumerate(self.labels) if have == label])
                for label in dict.fromkeys(self.labels)]  # fmt: skip
        for _ in range(resamples):
            drawn = torch.cat([mine[torch.randint(len(mine), (len(mine),), generator=g)] for mine in rows])
            out.append(torch.bincount(drawn, minlength=len(self.labels)).double())
        return out

    def curve(self, *, resamples: int = 200, seed: int = 0) -> pd.DataFrame:
        """method, baseline, features, damage, low, high (95 % over texts), spill, selectivity."""
        import pandas as pd

        damage, spill = self._changes(torch.ones(len(self.labels), dtype=torch.float64))
        spread = torch.stack([self._changes(times)[0] for times in self._draws(resamples, seed)])
        low, high = spread.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
        rows = [
            {"method": method, "baseline": baseline, "features": size, "damage": float(damage[i, j]),
             "low": float(low[i, j]), "high": float(high[i, j]), "spill": float(spill[i, j]),
             "selectivity": float(damage[i, j] / spill[i, j].clamp_min(1e-12))}
            for i, (method, baseline) in enumerate(self.kinds) for j, size in enumerate(self.sizes, 1)
        ]  # fmt: skip
        frame = pd.DataFrame(rows)
        frame.attrs.update(self.about)
        return frame

    def at_damage(self, damage: float, *, resamples: int = 200, seed: int = 0) -> pd.DataFrame:
        """method, baseline, damage, features, spill, selectivity, low, high (of the selectivity, 95 % over texts).

        Linear between the numbers of features that were tried, nothing removed among them; NaN for a kind that never
        does so much damage.
        """
        import pandas as pd

        point = self._at(torch.ones(len(self.labels), dtype=torch.float64), damage)
        drawn = torch.stack([self._at(times, damage)[1] for times in self._draws(resamples, seed)])
        rows = []
        for i, (method, baseline) in enumerate(self.kinds):
            there = (damage / drawn[:, i])[~drawn[:, i].isnan()]
            enough = len(there) > 0.9 * resamples > 0
            low, high = (there.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist() if enough
                         else (float("nan"), float("nan")))  # fmt: skip
            features, spill = (float(part[i]) for part in point)
            rows.append({"method": method, "baseline": baseline, "damage": damage, "features": features,
                         "spill": spill, "selectivity": damage / spill, "low": low, "high": high})  # fmt: skip
        frame = pd.DataFrame(rows)
        frame.attrs.update(self.about)
        return frame

    def _at(self, times: Tensor, damage: float) -> tuple[Tensor, Tensor]:
        """(features, spill) of each kind at a damage [kind]: at the first crossing, going up in features."""
        done, spill = self._changes(times)
        out = torch.full((2, len(done)), torch.nan, dtype=torch.float64)
        sizes = torch.tensor([0, *self.sizes], dtype=torch.float64)
        for i, (row, beside) in enumerate(zip(done, spill, strict=True)):
            over = (row >= damage).nonzero().flatten()
            if len(over) and damage > 0:
                j = int(over[0])
                part = (damage - row[j - 1]) / (row[j] - row[j - 1])
                out[0, i] = sizes[j - 1] + part * (sizes[j] - sizes[j - 1])
                out[1, i] = beside[j - 1] + part * (beside[j] - beside[j - 1])
        return out[0], out[1]


def resection(
    m: Model,
    off: Mapping[str, Off],
    chosen: Mapping[str, Mapping[str, Sequence[int]]],
    texts: Mapping[str, Sequence[Any]],
    *,
    sizes: Sequence[int] = (8, 32, 128),
    removed: Sequence[str] | None = None,
    alive: Mapping[str, Sequence[int]] | None = None,
    models: Mapping[str, Model] | None = None,
    first: int = 0,
    context: int = 128,
    run: int = 8,
    seed: int = 0,
) -> Removals:
    """Takes each label's best features out, few and many, and measures every label.

    Args:
        m: the model.
        off: by kind of feature what switches some of them off.
        chosen: by kind and label the features to take, the best first, chosen on texts that are not among these.
        texts: label -> texts.
        sizes: how many features; a kind that has fewer is left out above.
        removed: labels to remove, default all of `chosen`.
        alive: by kind the features that fire at all, from which random ones are drawn; without, there is no control.
        models: other models that some kinds belong to (a dense model's twin with experts); they must compute the same.
        first: the lowest layer that is edited: passes begin there, where the model allows it.
        context: tokens per text.
        run: texts per forward pass.
        seed: of the random features.

    Raises SAEError where a label has no texts, or a kind no features for it.
    """
    sizes = sorted(sizes)
    labels = list(removed or dict.fromkeys(label for found in chosen.values() for label in found))
    if not sizes or sizes[0] < 1:
        raise SAEError(f"sizes={list(sizes)}: expected numbers of features, at least 1")
    for label in labels:
        if not texts.get(label):
            raise SAEError(f"texts: none of {label!r}, which is to be removed; there are {', '.join(map(str, texts))}")
        for kind in off:
            if not chosen.get(kind, {}).get(label):
                raise SAEError(f"chosen[{kind!r}] has no features for {label!r}")
    every = [text for given in texts.values() for text in given]
    g = torch.Generator().manual_seed(seed)
    plans: list[tuple[str, str, dict[str, Sequence[int]]]] = [
        (kind, "none", {label: chosen[kind][label] for label in labels}) for kind in off
    ]
    for kind, living in (alive or {}).items():
        mixed = [list(living)[i] for i in torch.randperm(len(living), generator=g).tolist()]
        plans.append((kind, "random", dict.fromkeys(labels, mixed)))
    passes = {id(model): _Passes(model, every, first, context, run) for model in (m, *(models or {}).values())}
    clean = passes[id(m)].clean
    after = torch.full((len(plans), len(labels), len(sizes), len(every)), torch.nan, dtype=torch.float64)
    with bar("taking features out", total=len(plans) * len(labels) * len(sizes)) as advance:
        for i, (kind, _, ranked) in enumerate(plans):
            model = (models or {}).get(kind, m)
            for j, size in enumerate(sizes):
                done: dict[tuple[int, ...], Tensor] = {}  # random features are the same for every label
                for a, label in enumerate(labels):
                    ids = tuple(sorted(ranked[label][:size]))
                    if len(ids) == size:
                        if ids not in done:
                            edit = off[kind](list(ids))
                            with model.intervene(*(edit if isinstance(edit, list | tuple) else [edit])):
                                done[ids] = passes[id(model)]()[:, 0]
                        after[i, a, j] = done[ids]
                    advance(1)
    about = {"model": m.name, "texts": len(every), "tokens": int(clean[:, 1].sum()), "removed": labels, "seed": seed}
    names = [str(label) for label, given in texts.items() for _ in given]
    return Removals([(kind, baseline) for kind, baseline, _ in plans], [str(label) for label in labels], list(sizes),
                    names, clean[:, 1], clean[:, 0], after, about)  # fmt: skip


class _Passes:
    """Nats and predicted tokens of texts under whatever edits are on, from layer `first` on.

    What the layers below hand on is kept from one plain pass. Where beginning there does not give back the plain losses
    (a family whose late layers look past the stream), passes are whole.
    """

    def __init__(self, m: Model, texts: Sequence[Any], first: int, context: int, run: int) -> None:
        self.m, self.first, self.layers = m, first, m.anatomy.layers
        self.batches = [
            m.tokens(list(texts[i : i + run]), max_length=context, truncate=True) for i in range(0, len(texts), run)
        ]
        self.streams: list[Any] = []
        self.forms: list[int] = []
        plain = []
        for tokens in self.batches:
            with resume.outputs(self.layers) as left, resume.forms(self.layers) as self.forms:
                plain.append(self._nats(tokens))
            self.streams.append(left[first - 1] if first else None)
        self.clean = torch.cat(plain)
        if first and not torch.allclose(self(1), plain[0], rtol=1e-5):
            self.first = 0

    @torch.no_grad()
    def _nats(self, tokens: Any) -> Tensor:
        log = self.m(tokens)[:, :-1].float().log_softmax(-1)
        real = tokens.mask[:, 1:]
        nats = -log.gather(-1, tokens.ids[:, 1:, None])[..., 0] * real
        return torch.stack([nats.sum(1), real.sum(1).float()], 1).double().cpu()

    def __call__(self, batches: int | None = None) -> Tensor:
        """[text, (nats, tokens)], of the first `batches` batches."""
        out = []
        for tokens, stream in zip(self.batches[:batches], self.streams, strict=False):
            begun: AbstractContextManager[Any] = nullcontext()
            if self.first:
                begun = resume.resumed(self.layers, self.first, resume.copied(stream), self.forms)
            with begun:
                out.append(self._nats(tokens))
        return torch.cat(out)
