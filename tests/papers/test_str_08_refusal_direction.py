"""STR-08. Refusal in Language Models Is Mediated by a Single Direction (Arditi et al. 2024, arXiv:2406.11717).

Check, on planted refusal only: the direction is selected by the validation filters; erasing it cuts refusal and
adding it raises it, beyond random directions of its norm; logits of the weight-edited and the hook-edited model agree
to 1e-4, output biases and tied embeddings included; what a suffix does to the projection is printed
(`steering.projections`).

The planted model says token 5 ("no") to requests that carry a direction and token 6 otherwise; no text is involved.
"""

from __future__ import annotations

import pytest
import torch

import interp
import steering
from steering.fit_refusal import score
from steering.intervals import bootstrap
from steering.planted import AGAINST, NEUTRAL, WITH, YES, Planted


def refusals(p, rows, *changes):
    with p.m.intervene(*changes):
        return score(p.m(p.m.tokens(rows))[:, -1], [YES])


def test_selected_direction_erases_and_induces_beyond_random_ones():
    p = Planted(offset=3.0, answers=True)
    found = steering.refusal(
        p.m, p.texts(0, 10, WITH), p.texts(0, 10, NEUTRAL), p.texts(10, 18, WITH), p.texts(10, 18, NEUTRAL),
        tokens=[YES], positions=[-2, -1],
    )  # fmt: skip
    print(found.table.to_string(index=False))
    chosen = found.table[found.table.chosen].iloc[0]
    kept = found.table[found.table.kept]
    assert chosen.bypass == kept.bypass.min()
    assert (kept.kl <= 0.1).all()
    assert (kept.induce >= 0).all()
    assert (kept.layer < 0.8 * 3).all()
    assert found.vector.cosine(p.direction) >= 0.99

    asked, others = p.texts(18, 30, WITH), p.texts(18, 30, NEUTRAL)
    cut = refusals(p, asked, found.ablation) - refusals(p, asked)
    raised = refusals(p, others, found.vector) - refusals(p, others)
    g = torch.Generator().manual_seed(0)
    erased, added = [], []
    for _ in range(20):
        random = torch.randn(32, generator=g)
        random *= found.vector.norm / random.norm()
        erased.append(refusals(p, asked, steering.directional_ablation(p.m, random)) - refusals(p, asked))
        other = steering.SteeringVector.of(p.m, {found.vector.sites[0]: random}, scope="all")
        added.append(refusals(p, others, other) - refusals(p, others))
    low, high = bootstrap(cut - torch.stack(erased).mean(0))
    print(f"erased, less random: {low:.2f} .. {high:.2f}")
    assert high < 0
    low, high = bootstrap(raised - torch.stack(added).mean(0))
    print(f"induced, less random: {low:.2f} .. {high:.2f}")
    assert low > 0


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # gpt2: biases everywhere, tied embeddings, learned positions
def test_weight_edited_and_hook_edited_logits_agree(family):
    m = interp.load(f"tiny:{family}", **({"tie_word_embeddings": True} if family == "llama" else {}))
    r = torch.randn(m.d_model)
    unit = r / r.norm()
    ids = torch.arange(3, 15).view(2, 6)
    with m.intervene(steering.directional_ablation(m, r)):
        hooked = m(ids)
    hf = m.hf
    with torch.no_grad():
        # tied: the output matrix reads the stream and stays as it is, so the two must be parted first
        hf.lm_head.weight = torch.nn.Parameter(hf.lm_head.weight.detach().clone())
        writers = {
            "llama": lambda: [
                (w, None, 0) for b in hf.model.layers for w in (b.self_attn.o_proj.weight, b.mlp.down_proj.weight)
            ] + [(hf.model.embed_tokens.weight, None, 1)],
            "gpt2": lambda: [
                (c.weight, c.bias, 1) for b in hf.transformer.h for c in (b.attn.c_proj, b.mlp.c_proj)
            ] + [(hf.transformer.wte.weight, None, 1), (hf.transformer.wpe.weight, None, 1)],
        }[family]()  # fmt: skip
        for weight, bias, axis in writers:  # axis: which of the weight's axes is d_model
            flat = weight if axis == 1 else weight.T
            flat -= torch.outer(flat @ unit, unit)
            if bias is not None:
                bias -= (bias @ unit) * unit
    difference = float((m(ids) - hooked).abs().max())
    print(f"{family}: weight-edited against hook-edited logits, largest difference {difference:.1e}")
    assert difference <= 1e-4


def test_a_suffix_that_takes_the_direction_away_shows_in_the_projection():
    p = Planted(offset=3.0, answers=True)
    plain = p.texts(0, 20, WITH)
    suffixed = [[*row, AGAINST + i] for i, row in enumerate(plain)]  # a token that writes the opposite
    table = steering.projections(p.m, {"request": plain, "with suffix": suffixed}, p.direction)
    print(table.round(3).to_string(index=False))
    value = table.set_index(["label", "layer"])
    for layer in range(3):
        assert value.loc[("request", layer), "low"] > value.loc[("with suffix", layer), "high"]
