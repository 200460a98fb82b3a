"""The model as a Hugging Face citizen: caches, checkpoints, checkpointing, Auto classes, training."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from interp.monet import MonetConfig, MonetForCausalLM, MonetMask, MonetModel, masked
from interp.monet.router import MonetRouter

from .conftest import SIZES

Make = Callable[..., MonetForCausalLM]


# -- routing ---------------------------------------------------------------------------------------------------
def literal_axis(router: MonetRouter, x: Tensor, axis: int, k: int) -> Tensor:
    """The router of one axis, token by token and head by head: x [token, d] -> [token, head, n]."""
    w, norm = (router.w1, router.norm1) if axis == 1 else (router.w2, router.norm2)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    n = w.out_features // router.heads
    cut = math.sqrt(2) * float(torch.erfinv(torch.tensor(1 - 2 * k / n, dtype=torch.float64)))
    g = torch.zeros(len(x), router.heads, n)
    for t in range(len(x)):
        for h in range(router.heads):
            z = (w.weight[h * n : (h + 1) * n] @ x[t]).detach()
            normed = (z - norm.running_mean[h]) / math.sqrt(float(norm.running_var[h]) + 1e-5)
            kept = [i for i in range(n) if normed[i] >= min(float(normed.max()), cut)]
            g[t, h, kept] = torch.softmax(z[kept], 0)
    return g


def test_router_is_its_literal_formula(model: MonetForCausalLM) -> None:
    router = model.model.layers[0].router
    x = torch.randn(1, 40, 24)
    for axis, g in enumerate(router(x), 1):
        assert torch.allclose(g[0], literal_axis(router, x[0], axis, k=2), atol=1e-6)
        survivors = (g > 0).sum(-1)
        assert int(survivors.min()) >= 1
        assert len(survivors.unique()) > 1  # a threshold, not a top-k
        assert torch.allclose(g.sum(-1), torch.ones(()), atol=1e-6)


def test_topk_equal_to_the_number_of_keys_keeps_all(make: Make, ids: Tensor) -> None:
    out = make(moe_topk=6)(ids, output_router_probs=True)
    assert all(bool((g > 0).all()) for probs in out.router_probs if probs for g in probs)


def test_layers_of_a_group_share_one_routing(model: MonetForCausalLM, ids: Tensor) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    for moe in model.experts():
        moe.register_forward_pre_hook(lambda _, args: seen.append(args[1:]))
    out = model(ids, output_router_probs=True)
    assert [probs is None for probs in out.router_probs] == [False, True, False, True]
    for layer, (g1, g2) in enumerate(seen):
        first = out.router_probs[layer - layer % 2]
        assert g1 is first[0]
        assert g2 is first[1]
    assert model(ids).router_probs is None


def test_an_edit_of_the_routing_reaches_every_layer_of_its_group(model: MonetForCausalLM, ids: Tensor) -> None:
    """Zeroing row i of g1 = masking every (i, j) in all layers of the group."""

    def without_key_2(module: Any, args: Any, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return output[0].index_fill(-1, torch.tensor([2]), 0), output[1]

    with masked(model, MonetMask.full_rows(model, {1: [2]}, by="group")):
        expected = model(ids).logits
    handle = model.model.layers[2].router.register_forward_hook(without_key_2)
    assert torch.allclose(model(ids).logits, expected, atol=1e-5)
    handle.remove()
    assert not torch.allclose(model(ids).logits, expected, atol=1e-3)


# -- caches ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("with_mask", [False, True])
def test_cache_equals_no_cache(model: MonetForCausalLM, ids: Tensor, with_mask: bool) -> None:
    if with_mask:
        model.set_expert_mask(MonetMask.from_keep(model, {1: torch.rand(6, 6) > 0.3}))
    whole, past, steps = model(ids).logits, None, []
    for t in range(ids.shape[1]):
        out = model(ids[:, t : t + 1], past_key_values=past, use_cache=True)
        past = out.past_key_values
        steps.append(out.logits)
    assert torch.allclose(torch.cat(steps, 1), whole, atol=1e-5)
    kw: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, use_cache=True, **kw), model.generate(ids, use_cache=False, **kw))


def test_padding_on_the_left_changes_nothing(model: MonetForCausalLM, ids: Tensor) -> None:
    padded = torch.cat((torch.zeros_like(ids[:, :3]), ids), 1)
    mask = torch.cat((torch.zeros_like(ids[:, :3]), torch.ones_like(ids)), 1)
    out = model(padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    assert torch.allclose(out.logits[:, 3:], model(ids).logits, atol=1e-5)


# -- checkpoints -----------------------------------------------------------------------------------------------
def test_round_trip_is_bit_identical(model: MonetForCausalLM, ids: Tensor, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == model.config.to_diff_dict()
    body = AutoModel.from_pretrained(tmp_path)
    assert isinstance(body, MonetModel)
    assert torch.equal(body.eval()(ids).last_hidden_state, model.model(ids).last_hidden_state)


def test_half_precision_keeps_the_routing_statistics(model: MonetForCausalLM, ids: Tensor, tmp_path: Path) -> None:
    model.set_expert_mask(MonetMask.from_pairs(model, {1: [(0, 3)]}))
    model.save_pretrained(tmp_path)
    half = MonetForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    norms = [layer.router.norm1 for layer in half.model.layers if layer.router is not None]
    assert all(norm.running_var.dtype == torch.float32 for norm in norms)
    assert half.model.layers[1].moe.keep.dtype == torch.bool
    out = half(ids, output_router_probs=True)
    assert out.logits.dtype == torch.bfloat16
    assert out.router_probs[0][0].dtype == torch.float32


def test_a_config_that_names_remote_code_uses_ours(model: MonetForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "m.MonetConfig", "AutoModelForCausalLM": "m.MonetForCausalLM"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "m.py").write_text("raise RuntimeError('this code must not run')")
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path), MonetForCausalLM)


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def test_a_checkpoint_with_missing_tensors_is_refused(model: MonetForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda t: t.pop("model.layers.2.router.norm1.running_var"))  # type: ignore[func-returns-value]
    with pytest.raises(ValueError, match=r"model\.layers\.2\.router\.norm1\.running_var"):
        MonetForCausalLM.from_pretrained(tmp_path)


def test_a_checkpoint_of_another_shape_is_refused(model: MonetForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda t: t.update({"model.norm.weight": torch.ones(5)}))
    with pytest.raises(ValueError, match=r"model\.norm\.weight: \(5,\)"):
        MonetForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(("wrong", "says"), [
    ({"moe_decompose": "diagonal"}, "moe_decompose='diagonal'"),
    ({"moe_topk": 7}, "moe_topk=7"),
    ({"moe_heads": 0}, "moe_heads=0"),
    ({"moe_dim": 5, "moe_decompose": "vertical"}, "moe_dim=5"),
    ({"moe_masked_layers": [4]}, "moe_masked_layers"),
])  # fmt: skip
def test_sizes_that_do_not_fit_are_refused(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(Exception, match=says):
        MonetConfig(**SIZES | wrong)


def test_importing_interp_does_not_import_monet() -> None:
    code = "import sys, interp; assert 'interp.monet' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# -- losses and training ---------------------------------------------------------------------------------------
def test_losses_are_their_literal_formulas(model: MonetForCausalLM, ids: Tensor) -> None:
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    with torch.no_grad():
        out = model(ids, attention_mask=mask, labels=labels, output_router_probs=True)
    heads, n = model.config.moe_heads, model.config.moe_experts
    uniform, ambiguous, routers = 0.0, 0.0, [probs for probs in out.router_probs if probs is not None]
    real = [(b, t) for b in range(ids.shape[0]) for t in range(ids.shape[1]) if mask[b, t]]
    for g1, g2 in routers:
        for g in (g1, g2):
            for h in range(heads):
                for i in range(n):
                    mean = sum(float(g[b, t, h, i]) for b, t in real) / len(real)
                    uniform -= math.log(max(mean, 1e-10)) / (2 * heads * n)
                ambiguous += sum(1 - float(g[b, t, h].max()) for b, t in real) / len(real) / (2 * heads)
    uniform, ambiguous = uniform / len(routers), ambiguous / len(routers)
    assert float(out.uniformity_loss) == pytest.approx(uniform, rel=1e-5)
    assert float(out.ambiguity_loss) == pytest.approx(ambiguous, rel=1e-5)
    assert uniform > math.log(n)  # its least value
    assert float(out.aux_loss) == pytest.approx(1e-3 * (uniform + ambiguous), rel=1e-5)
    logp = out.logits.log_softmax(-1)
    nll = [-float(logp[b, t, labels[b, t + 1]]) for b, t in real if t + 1 < ids.shape[1] and labels[b, t + 1] != -100]
    assert float(out.lm_loss) == pytest.approx(sum(nll) / len(nll), rel=1e-5)
    assert float(out.loss) == pytest.approx(float(out.lm_loss) + float(out.aux_loss), rel=1e-6)
    assert model(ids).aux_loss is None


def test_uniform_routing_has_the_least_uniformity_loss() -> None:
    from interp.monet.losses import ambiguity, uniformity

    even, one = torch.full((1, 4, 2, 8), 1 / 8), torch.zeros(1, 8, 2, 8)
    one[0, torch.arange(8), :, torch.arange(8)] = 1  # every token its own key
    assert float(uniformity(even, even)) == pytest.approx(math.log(8))
    assert float(uniformity(one, one)) == pytest.approx(math.log(8))
    assert float(ambiguity(even, even)) == pytest.approx(7 / 8)
    assert float(ambiguity(one, one)) == 0.0


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_loss_gradient_or_statistic(make: Make, ids: Tensor, reentrant: bool) -> None:
    results = []
    for checkpointing in (False, True):
        model = make().train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        out = model(ids, labels=ids)
        out.loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        results.append((out.loss, grads, dict(model.named_buffers())))
    (loss, grads, buffers), (loss2, grads2, buffers2) = results
    assert torch.equal(loss, loss2)
    for name, grad in grads.items():
        assert grad is not None, name
        assert torch.allclose(grad, grads2[name], atol=1e-7), name
    for name, buffer in buffers.items():
        assert torch.equal(buffer, buffers2[name]), name


def test_statistics_move_as_batchnorm_moves_them_and_only_in_training(make: Make, ids: Tensor) -> None:
    model = make()
    router = model.model.layers[0].router
    start = {name: b.clone() for name, b in router.named_buffers()}
    model(ids)
    assert all(torch.equal(b, start[name]) for name, b in router.named_buffers())
    inputs: list[Tensor] = []
    handle = router.w1.register_forward_hook(lambda module, args, out: inputs.append(out.detach()))
    model.train()(ids)
    handle.remove()
    reference = torch.nn.BatchNorm1d(router.heads, affine=False)
    reference.load_state_dict({name[6:]: b for name, b in start.items() if name.startswith("norm1.")})
    reference(inputs[0].unflatten(-1, (router.heads, -1)).flatten(0, 1))
    for name, b in reference.named_buffers():
        assert torch.allclose(b, getattr(router.norm1, name), atol=1e-6), name
    assert not torch.equal(router.norm1.running_mean, start["norm1.running_mean"])


def test_training_learns_a_toy_task_and_trains_the_router(make: Make) -> None:
    """Count up modulo 12; the router's weights learn along and its statistics follow."""
    model = make(initializer_range=0.05).train()
    generator = torch.Generator().manual_seed(0)
    router = model.model.layers[0].router
    before = router.w1.weight.clone(), router.norm1.running_var.clone()
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    history = []
    for _ in range(60):
        half = torch.randint(12, (16, 1), generator=generator)
        batch = (half + torch.arange(10)) % 12
        loss = model(batch, labels=batch).lm_loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        history.append(float(loss))
    assert history[-1] < history[0] - 1.0
    assert not torch.equal(router.w1.weight, before[0])
    assert not torch.allclose(router.norm1.running_var, before[1])
    model.eval()
    start = torch.arange(12)[:, None]
    prompt = (start + torch.arange(4)) % 12
    assert float((model(prompt).logits[:, -1].argmax(-1) == (prompt[:, -1] + 1) % 12).float().mean()) > 0.9
