"""EDT-01, Model Surgery (Wang et al. 2024, arXiv:2407.08770): a few rows of the gates, shifted by a probe.

Check: only the selected rows differ, and undoing restores the weights' hash; on a model taught two registers the
likelihood of rude words that the probe never saw falls, more than by as many random rows; its loss on ordinary text
is printed.
"""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

import interp
from steering import SteeringError
from steering.intervals import bootstrap
from steering.surgery import behaviour_probe, surgery

RUDE, SEEN, HELD_OUT = range(60, 80), range(60, 70), range(70, 80)
PLAIN = range(10, 50)


def digest(m) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(m.hf.state_dict().items()):
        found.update(name.encode() + tensor.numpy().tobytes())
    return found.hexdigest()


def cosines(m, direction):
    return {
        (layer, row): float(torch.nn.functional.cosine_similarity(w, direction, dim=0))
        for layer in range(m.n_layers) for row, w in enumerate(m.hf.model.layers[layer].mlp.gate_proj.weight.detach())
    }  # fmt: skip


def test_the_rows_that_point_against_the_probe_and_no_others():
    m = interp.load("tiny:llama")
    direction = torch.randn(32, generator=torch.Generator().manual_seed(1))
    before, start = {k: t.clone() for k, t in m.hf.state_dict().items()}, digest(m)
    cut = surgery(m, direction, rows=7, alpha=0.5)
    wanted = sorted(cosines(m, direction).items(), key=lambda item: item[1])[:7]
    chosen = {(int(name.split(".")[2]), row) for name, rows in cut.rows.items() for row in rows.tolist()}
    assert chosen == {key for key, _ in wanted}
    assert len(cut) == 7
    with cut.applied(m):
        assert digest(m) != start
        for name, tensor in m.hf.state_dict().items():
            changed = (tensor != before[name]).flatten(1).any(1).nonzero()[:, 0].tolist() if tensor.dim() > 1 else []
            assert changed == cut.rows.get(name, torch.tensor([])).tolist()
            for row in changed:
                torch.testing.assert_close(tensor[row], before[name][row] + 0.5 * direction)
    assert digest(m) == start
    with pytest.raises(RuntimeError, match="stop"), cut.applied(m):
        raise RuntimeError("stop")
    assert digest(m) == start


def test_a_checkpoint_is_the_shifted_model(tmp_path):
    m = interp.load("tiny:llama")
    cut = surgery(m, torch.randn(32), rows=5, alpha=2.0)
    start = digest(m)
    cut.save(m, tmp_path / "out")
    assert digest(m) == start
    with cut.applied(m):
        wanted = m([[5, 9, 3]])
    torch.testing.assert_close(interp.load(str(tmp_path / "out"))([[5, 9, 3]]), wanted, atol=1e-5, rtol=0)


def test_random_rows_are_others_and_as_many():
    m = interp.load("tiny:llama")
    cut = surgery(m, torch.randn(32), rows=30)
    control = cut.random(m, 0)
    assert len(control) == 30
    own = {(n, r) for n, rows in cut.rows.items() for r in rows.tolist()}
    assert not own & {(n, r) for n, rows in control.rows.items() for r in rows.tolist()}
    with pytest.raises(SteeringError, match="choose fewer"):
        surgery(m, torch.randn(32), rows=100).random(m)


@pytest.mark.parametrize(("how", "message"), [({"rows": 0}, "rows=0"), ({"rows": 10**6}, "gate rows"),
                                              ({"direction": torch.ones(5)}, "direction"),
                                              ({"direction": torch.zeros(32)}, "not zero")])  # fmt: skip
def test_bad_input(how, message):
    m = interp.load("tiny:llama")
    with pytest.raises(SteeringError, match=message):
        surgery(m, **{"direction": torch.ones(32), "rows": 3, **how})
    with (
        pytest.raises(SteeringError, match="another model"),
        surgery(m, torch.ones(32), 3).applied(interp.load("tiny:llama", seed=1)),
    ):
        pass


def sentences(rude: bool, n: int, words, seed: int) -> list[list[int]]:
    """Plain words, and in rude ones a rude word behind every second."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(n):
        row = [3]
        while len(row) < 12:
            row.append(int(rng.choice(PLAIN)))
            if rude:
                row.append(int(rng.choice(words)))
        out.append(row[:12])
    return out


@pytest.fixture(scope="module")
def taught():
    """A tiny Llama that has learnt both registers: after one rude word come others, after none none."""
    m = interp.load("tiny:llama")
    ids = torch.tensor(sentences(True, 300, RUDE, 1) + sentences(False, 300, RUDE, 2))
    step = torch.optim.Adam(m.hf.parameters(), lr=3e-3)
    m.hf.train()
    g = torch.Generator().manual_seed(0)
    for _ in range(120):
        batch = ids[torch.randint(len(ids), (64,), generator=g)]
        logits = m.hf(input_ids=batch).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        step.zero_grad()
        loss.backward()
        step.step()
    m.hf.eval().requires_grad_(False)
    return interp.Model(m.hf, name="two registers")


def mass(m, rows, words) -> np.ndarray:
    """Mean log-probability, behind plain words, that the next word is one of `words` [sentence]: what would be
    written.
    """
    ids = torch.tensor(rows)
    p = m(ids)[:, 1:-1].softmax(-1)[..., words[0] : words[-1] + 1].sum(-1)
    behind_plain = (ids[:, 1:-1] >= PLAIN[0]) & (ids[:, 1:-1] <= PLAIN[-1])
    return ((p * behind_plain).sum(1) / behind_plain.sum(1)).log().numpy()


def loss(m, rows) -> float:
    ids = torch.tensor(rows)
    logits = m(ids)[:, :-1]
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))


def test_held_out_rude_words_become_less_likely(taught):
    """Layer, number of rows and alpha are chosen on the words that the probe has seen, and scored on the others."""
    m = taught
    tuning, rude, plain = sentences(True, 60, RUDE, 5), sentences(True, 60, RUDE, 6), sentences(False, 60, RUDE, 7)
    size = float(m.hf.model.layers[0].mlp.gate_proj.weight.detach().norm(dim=1).mean())
    seen = mass(m, tuning, SEEN).mean()
    best, chosen = 0.0, None
    for layer in range(m.n_layers):
        v = behaviour_probe(m, sentences(True, 60, SEEN, 3), sentences(False, 60, SEEN, 4), layer)
        for rows in (15, 40):
            for alpha in (0.5, 2.0):
                cut = surgery(m, v / v.norm() * size, rows, alpha)
                with cut.applied(m):
                    change = mass(m, tuning, SEEN).mean() - seen
                if change < best:
                    best, chosen, about = change, cut, f"probe of layer {layer}, {rows} rows, alpha {alpha}"
    assert chosen is not None
    base, plain_loss = mass(m, rude, HELD_OUT), loss(m, plain)
    with chosen.applied(m):
        own, after = mass(m, rude, HELD_OUT) - base, loss(m, plain)
    controls = []
    for seed in range(20):
        with chosen.random(m, seed).applied(m):
            controls.append(mass(m, rude, HELD_OUT) - base)
    low, high = bootstrap(own - np.mean(controls, 0))
    spread = [float(c.mean()) for c in controls]
    told = f"{np.mean(spread):+.3f} ({min(spread):+.3f} to {max(spread):+.3f})"
    print(f"\n{about}: held-out rude words {own.mean():+.3f} nats; as many random rows, 20 times: {told}")
    print(f"beyond them: {low:+.3f} to {high:+.3f}; loss on plain text {plain_loss:.3f} -> {after:.3f}")
    assert own.mean() < 0
    assert high < 0
