"""Dense models as experts: every MLP dealt into a Mixture of Experts, and the model otherwise as it was.

    moe = experts.split(m, n=16, how="weights")                 all experts on: the same model, to rounding
    moe = experts.split(m, n=16, active=5, gate="oracle")       the five that matter most for each token
    stats = experts.routing(moe, texts, norms=True)             and every other tool of this package

The result is a Model with fused experts behind transformers' own interface, so everything that works for a Mixture of
Experts works on it. Attention, norms and embeddings are shared with the dense model, not copied.

A plain or gated MLP is a sum over neurons, so D h = sum over experts of D_e h_e, whatever the partition. What is lost
with fewer experts on depends on the partition (`interp.experts.partition`) and on the gate, which scores experts:

    average      x . mean of the experts' input vectors        EMoE's avg-k (arXiv 2310.10908): adds no parameters
    similarity   cosine of x and that mean                     MoEfication's parameter centre (arXiv 2110.01786)
    fitted       linear in x, fitted to what the oracle says   MoEfication fits a small network here
    oracle       norm of what the expert would put out         computes them all: an upper bound, no gate
    random       a random direction for each expert            a lower bound

The weight of every active expert is 1, as in those papers.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from interp.experts.batches import Corpus, Labelled, corpus
from interp.experts.ffn import Ffn, read
from interp.experts.partition import Partition, partition
from interp.experts.sets import ExpertSet
from interp.experts.units import ExpertError
from interp.hooks.slots import given

GATES = ("average", "similarity", "fitted", "oracle", "random")


class SplitFfn(nn.Module):
    """One MLP as experts. Stands where the MLP stood: [..., d_model] -> [..., d_model]."""

    def __init__(self, experts: nn.Module, gate: nn.Module, bias: Tensor | None) -> None:
        super().__init__()
        self.gate, self.experts = gate, experts
        self.bias = None if bias is None else nn.Parameter(bias.clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        _, weights, ids = self.gate(flat)
        out = self.experts(flat, ids, weights).view(x.shape)
        return out if self.bias is None else out + self.bias


class SplitGate(nn.Module):
    """Scores experts by a linear map and takes the `top_k` best: logits [token, expert], weights (1) and ids."""

    def __init__(self, weight: Tensor, bias: Tensor | None, top_k: int, cosine: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.top_k, self.cosine = top_k, cosine

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = linear(nn.functional.normalize(x, dim=-1) if self.cosine else x, self.weight, self.bias)
        ids = logits.topk(self.top_k, dim=-1).indices
        return logits, torch.ones_like(ids, dtype=x.dtype), ids


class OracleGate(nn.Module):
    """Takes the experts that put out most, which it finds by computing all of them."""

    def __init__(self, experts: nn.Module, top_k: int) -> None:
        super().__init__()
        self.__dict__["of"] = experts  # not a child: they are the block's
        self.top_k = top_k

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = sizes(self.of, x)
        ids = logits.topk(self.top_k, dim=-1).indices
        return logits, torch.ones_like(ids, dtype=x.dtype), ids


def sizes(experts: Any, x: Tensor) -> Tensor:
    """Norm of what each expert makes of each row [row, expert]; x [row, d_model]."""
    return torch.stack([experts.one(e, x).norm(dim=-1) for e in range(experts.num_experts)], -1)


@cache
def _experts_class(gated: bool) -> type[nn.Module]:
    """The experts module, registered with transformers' experts interface."""
    from transformers.integrations.moe import use_experts_implementation

    class SplitExperts(nn.Module):
        """Fused experts; weights as in transformers' own families, [expert, out, in]."""

        def __init__(self, config: Any, ffn: Ffn, groups: Tensor) -> None:
            super().__init__()
            self.num_experts, self.act_fn = len(groups), ffn.act

            def own(tensor: Tensor) -> nn.Parameter:
                return nn.Parameter(tensor.clone(), requires_grad=False)

            def deal(rows: Tensor | None, like: Tensor) -> Tensor:  # [neuron, ...] -> [expert, neuron, ...]
                return (like.new_zeros(len(like)) if rows is None else rows)[groups.to(like.device)]

            if ffn.gate is not None:
                self.gate_up_proj = own(torch.cat([deal(ffn.gate, ffn.up), deal(ffn.up, ffn.up)], 1))
                both = [deal(ffn.gate_bias, ffn.up), deal(ffn.up_bias, ffn.up)]
                self.gate_up_proj_bias = own(torch.cat(both, 1))
            else:
                self.up_proj, self.up_proj_bias = own(deal(ffn.up, ffn.up)), own(deal(ffn.up_bias, ffn.up))
            self.down_proj = own(ffn.down.T[groups.to(ffn.down.device)].transpose(1, 2).contiguous())
            self.down_proj_bias = own(ffn.down.new_zeros(len(groups), ffn.down.shape[0]))

        def one(self, expert: int, x: Tensor) -> Tensor:
            """Output of one expert: [row, d_model] -> [row, d_model]."""
            if gated:
                gate, up = linear(x, self.gate_up_proj[expert], self.gate_up_proj_bias[expert]).chunk(2, dim=-1)
                hidden = self.act_fn(gate) * up
            else:
                hidden = self.act_fn(linear(x, self.up_proj[expert], self.up_proj_bias[expert]))
            return linear(hidden, self.down_proj[expert], self.down_proj_bias[expert])

        def forward(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            out = torch.zeros_like(hidden)
            for expert in range(self.num_experts):
                row, slot = (ids == expert).nonzero(as_tuple=True)
                if len(row):
                    term = self.one(expert, hidden[row]) * weights[row, slot, None]
                    out.index_add_(0, row, term.to(out.dtype))
            return out

    return use_experts_implementation(SplitExperts, has_gate=gated, has_bias=True)


@torch.no_grad()
def split(
    model: Any,
    n: int = 16,
    how: str = "weights",
    *,
    active: int | None = None,
    gate: str = "average",
    texts: Labelled | Corpus | None = None,
    layers: list[int] | None = None,
    max_tokens: int | None = 20_000,
    seed: int = 0,
    groups: Partition | None = None,
) -> Any:
    """A Mixture of Experts made of a dense model's MLPs.

    Args:
        model: a dense Model; it stays as it is.
        n: experts per layer.
        how: which neurons make an expert: "weights", "coactivation" or "random".
        active: experts on for each token; default all, which is the dense model itself.
        gate: how the active ones are chosen; see the module.
        texts: label -> documents, for how="coactivation" and gate="fitted".
        layers: which are split, default all with a dense MLP; the others stay dense.
        max_tokens: of each label of `texts`.
        seed: of the partition and of gate "random".
        groups: a `Partition` made before, in the place of n, how and seed.

    Returns a new Model; ``.card["partition"]`` has the neurons of each expert. Raises ExpertError for a layer that is
    neither plain nor gated, an `n` that does not divide its neurons, and for missing texts.
    """
    from interp.model import Model

    if gate not in GATES:
        raise ExpertError(f"gate={gate!r}: expected one of {', '.join(GATES)}")
    made = groups or partition(model, n, how, texts=texts, layers=layers, max_tokens=max_tokens, seed=seed)
    active = made.n if active is None else active
    if not 1 <= active <= made.n:
        raise ExpertError(f"active={active}: expected 1..{made.n} experts")
    if gate == "fitted" and texts is None:
        raise ExpertError("gate='fitted' is fitted to activations; pass texts={label: [text, ...]}")
    shared = {id(t): t for t in (*model.hf.parameters(), *model.hf.buffers())}
    hf = copy.deepcopy(model.hf, shared)  # modules anew, weights shared
    hf.config._experts_implementation = "eager"
    name = f"{model.name} in {made.n} experts"
    twin = Model(hf, model.tokenizer, name if active == made.n else f"{name}, {active} on")
    ffns = {layer: read(twin, layer) for layer in made.groups}
    inputs = _inputs(model, corpus(model, texts, max_tokens), ffns) if gate == "fitted" and texts is not None else {}
    generator = torch.Generator().manual_seed(seed)
    for layer, ffn in ffns.items():
        experts = _experts_class(ffn.gate is not None)(hf.config, ffn, made.groups[layer])
        chooser: nn.Module
        if gate == "oracle":
            chooser = OracleGate(experts, active)
        else:
            chooser = _gate(gate, ffn, made.groups[layer], experts, active, inputs.get(layer), generator)
        setattr(ffn.parent, ffn.name, SplitFfn(experts, chooser, ffn.down_bias).train(hf.training))
    result = Model(hf, model.tokenizer, twin.name)
    result.card = {**model.card, "partition": made, "gate": gate, "active": active, "dense": model.name}
    return result


def _gate(
    gate: str, ffn: Ffn, groups: Tensor, experts: Any, active: int, x: Tensor | None, generator: torch.Generator
) -> SplitGate:  # fmt: skip
    keys = ffn.up if ffn.gate is None else ffn.gate
    centre = keys[groups.to(keys.device)].mean(1)  # [expert, d_model]
    if gate == "random":
        return SplitGate(torch.randn(centre.shape, generator=generator).to(centre), None, active, False)
    if gate == "similarity":
        return SplitGate(nn.functional.normalize(centre, dim=-1), None, active, True)
    if gate == "fitted":
        assert x is not None
        weight, bias = _ridge(x, sizes(experts, x))
        return SplitGate(weight.to(centre), bias.to(centre), active, False)
    return SplitGate(centre.clone(), None, active, False)


def _ridge(x: Tensor, y: Tensor, strength: float = 1e-2) -> tuple[Tensor, Tensor]:
    """Weights [out, in] and bias [out] of the linear map from x [row, in] to y [row, out], a little held back."""
    x, y = x.double(), y.double()
    mean, level = x.mean(0), y.mean(0)
    a = x - mean
    gram = a.T @ a
    gram += strength * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    weight = torch.linalg.solve(gram, a.T @ (y - level)).T
    return weight, level - weight @ mean


def _inputs(model: Any, data: Corpus, ffns: dict[int, Ffn], most: int = 8192) -> dict[int, Tensor]:
    """layer -> what its MLP is given on some text [token, d_model]."""
    kept: dict[int, list[Tensor]] = {layer: [] for layer in ffns}
    with given({layer: read(model, layer).block for layer in ffns}) as seen:
        total = 0
        for batch in data.batches(model, 2048):
            model(batch.tokens)
            for layer, x in seen.items():
                kept[layer].append(x[batch.tokens.mask])
            total += int(batch.tokens.mask.sum())
            if total >= most:
                break
    return {layer: torch.cat(parts) for layer, parts in kept.items()}


def neurons(chosen: ExpertSet, split_model: Any, dense: Any) -> ExpertSet:
    """The neurons that a set of split experts is made of, as a set of the dense model's neurons.

    Switching either off is the same; the dense set can be baked into a checkpoint (`experts.resect`).
    """
    made = split_model.card.get("partition")
    if made is None:
        raise ExpertError(f"{split_model.name} was not made by experts.split")
    chosen.check(split_model)
    ids = {layer: made.groups[layer][units].flatten() for layer, units in chosen.ids.items()}
    return ExpertSet(dense, ids, "neurons", {"rule": "experts of a split", "of": chosen.record})
