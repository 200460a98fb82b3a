"""Every family of the table becomes a small, seeded, causal model in which no part is idle."""

from __future__ import annotations

import doctest
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from interp.zoo.families import FAMILIES, NO_ATTENTION, UNBUILT, families
from interp.zoo.tiny import SIZES, shrink, tiny

BATCH, POS = 2, 12
# Ids away from the special tokens, which are 0, 1, 2 and the last few of the vocabulary.
IDS = torch.randint(3, 90, (BATCH, POS), generator=torch.Generator().manual_seed(7))


def logits(model: PreTrainedModel, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def text_config(model: PreTrainedModel) -> transformers.PretrainedConfig:
    return model.config.get_text_config()


def expert_modules(model: PreTrainedModel) -> Iterator[nn.Module]:
    """Modules that hold the fused weights of all experts of a layer, [expert, ., .], those for images aside."""
    for name, module in model.named_modules():
        down = getattr(module, "down_proj", None)
        fused = isinstance(down, nn.Parameter) and down.ndim == 3 and len(down) == SIZES["num_experts"]
        if fused and "vision" not in name:
            yield module


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Matrices this small are done before a second thread is awake; on a busy machine it only gets in the way."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    family = FAMILIES[request.param]
    if family.kind != "factored" and family.model_type not in CONFIG_MAPPING_NAMES:
        pytest.skip(f"transformers {transformers.__version__} has no {request.param}")
    return request.param


@pytest.fixture(scope="module")
def model(family: str) -> PreTrainedModel:
    return tiny(family)


# --- every family ---


def test_logits_are_finite_of_a_sensible_scale_and_differ_between_tokens(model: PreTrainedModel) -> None:
    out = logits(model)
    assert out.shape[:2] == (BATCH, POS)
    assert torch.isfinite(out).all()
    assert 0.2 < out.std() < 5
    assert out.std(dim=1).mean() > 0.1  # over positions
    assert not torch.allclose(out[0], out[1], atol=0.1)


def test_no_position_sees_a_later_one(model: PreTrainedModel) -> None:
    changed = IDS.clone()
    changed[:, -1] = (changed[:, -1] + 20) % 80 + 3
    before, after = logits(model), logits(model, changed)
    # not exactly equal: the experts of all tokens are one matrix product, whose shape depends on the routing
    torch.testing.assert_close(before[:, :-1], after[:, :-1], atol=1e-5, rtol=0)
    assert not torch.allclose(before[:, -1], after[:, -1], atol=1e-3)


def test_one_seed_is_one_model_and_two_are_two(family: str, model: PreTrainedModel) -> None:
    torch.rand(3)  # whatever the global generator did in between
    again, other = tiny(family).state_dict(), tiny(family, seed=1).state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again[name]), name
    for name, weight in model.named_parameters():
        assert not torch.equal(weight, other[name]), name


def test_it_is_small_in_eval_mode_and_in_float32(model: PreTrainedModel) -> None:
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert 1e4 < sum(p.numel() for p in model.parameters()) < 3e5
    config = text_config(model)
    assert config.vocab_size == SIZES["vocab_size"]
    assert config.hidden_size == SIZES["hidden_size"]
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        assert getattr(config, name, None) in (None, 0, 1, 2)


def test_no_weight_is_constant(model: PreTrainedModel) -> None:
    biases = {n: b for n, b in model.named_buffers() if n.endswith(("correction_bias", "expert_bias"))}
    for name, weight in {**dict(model.named_parameters()), **biases}.items():
        assert torch.isfinite(weight).all(), name
        assert weight.numel() < 3 or weight.std() > 0.01, name


def test_experts_are_fused_where_the_table_says_so(family: str, model: PreTrainedModel) -> None:
    kind = FAMILIES[family].kind
    assert any(expert_modules(model)) or kind != "moe"
    assert not any(expert_modules(model)) or kind != "dense"
    # transformers' own switch: a silent no-op on the undecorated families
    if kind != "dense":
        assert model._can_set_experts_implementation() == (kind == "moe")
    kinds_of_mlp = getattr(text_config(model), "mlp_layer_types", None)
    if kind != "dense" and kinds_of_mlp:
        assert len(set(kinds_of_mlp)) > 1  # dense layers beside those with experts, or two kinds of routing


def test_gradients_reach_the_embeddings_and_the_experts_of_every_layer(model: PreTrainedModel) -> None:
    model.zero_grad(set_to_none=True)
    model(IDS).logits.square().mean().backward()
    for weight in [model.get_input_embeddings().weight, *(m.down_proj for m in expert_modules(model))]:
        assert weight.grad is not None
        assert weight.grad.abs().max() > 0
    model.zero_grad(set_to_none=True)


# --- the table ---


def decorated_families() -> set[str]:
    """Folders of the installed transformers whose modelling file uses the experts interface."""
    models = Path(transformers.__file__).parent / "models"
    files = models.glob("*/modeling_*.py")
    return {f.parent.name for f in files if "@use_experts_implementation" in f.read_text(encoding="utf8")}


def test_every_decorated_family_is_listed_or_left_out_for_a_reason() -> None:
    decorated = decorated_families()
    assert len(decorated) > 40
    assert decorated <= FAMILIES.keys() | UNBUILT.keys()
    ours = {name for name in families("moe") if FAMILIES[name].model_type in CONFIG_MAPPING_NAMES}
    assert ours <= decorated


def test_every_causal_language_model_of_transformers_is_accounted_for() -> None:
    known = FAMILIES.keys() | {f.model_type for f in FAMILIES.values()} | UNBUILT.keys() | set(NO_ATTENTION)
    assert set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) <= known


def test_counts_that_the_readme_may_quote() -> None:
    assert len(families("moe")) >= 56
    assert len(families("moe-undecorated")) >= 3
    assert len(families("dense")) >= 50
    assert families() == [n for kind in ("moe", "moe-undecorated", "factored", "dense") for n in families(kind)]
    assert not FAMILIES.keys() & (UNBUILT.keys() | set(NO_ATTENTION))
    assert all(len(reason) > 20 for reason in UNBUILT.values())


# --- the recipe ---


def test_widths_of_different_roles_differ() -> None:
    model = tiny("deepseek_v3")
    dense, sparse = model.model.layers[0].mlp, model.model.layers[1].mlp
    assert dense.up_proj.weight.shape == (40, 32)
    assert sparse.experts.gate_up_proj.shape == (8, 2 * 24, 32)
    assert sparse.gate.weight.shape == (8, 32)
    attention = model.model.layers[0].self_attn
    assert attention.q_b_proj.weight.shape == (4 * (8 + 6), 18)
    assert attention.kv_b_proj.weight.shape == (4 * (8 + 12), 20)


def test_a_router_s_choice_bias_matters() -> None:
    model = tiny("deepseek_v3")
    before = logits(model)
    for layer in model.model.layers[1:]:
        layer.mlp.gate.e_score_correction_bias.zero_()
    assert not torch.allclose(before, logits(model), atol=1e-3)


def test_the_routers_prefer_experts_but_none_always() -> None:
    model = tiny("olmoe")
    chosen: list[Tensor] = []
    gate = model.model.layers[0].mlp.gate
    handle = gate.register_forward_hook(lambda module, args, out: chosen.append(out[2]))
    logits(model, torch.randint(3, 90, (8, 32)))
    handle.remove()
    share = torch.bincount(chosen[0].flatten(), minlength=8) / chosen[0].numel()
    assert share.min() > 0
    assert share.max() < 0.5
    assert share.std() > 0.01


def test_a_token_id_router_gives_each_token_distinct_experts() -> None:
    table = tiny("deepseek_v4").model.layers[0].mlp.gate.tid2eid
    assert table.shape == (101, 2)
    assert (table[:, 0] != table[:, 1]).all()
    assert len(table.unique()) == 8


def test_a_sliding_window_is_small_enough_to_matter() -> None:
    model = tiny("mistral")  # window 5 in each of 3 layers: the last position reads 3 * 4 positions back
    ids = torch.cat([IDS, IDS], dim=1)[:1]
    changed = ids.clone()
    changed[:, : 24 - 13] = 5
    before, after = logits(model, ids), logits(model, changed)
    torch.testing.assert_close(before[:, -1], after[:, -1], atol=1e-5, rtol=0)
    assert not torch.allclose(before[:, -3], after[:, -3], atol=1e-3)


def test_overrides_go_before_the_recipe() -> None:
    model = tiny("gemma3", num_hidden_layers=5, vocab_size=50)
    assert len(model.model.layers) == 5
    assert model.config.layer_types == ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"]
    assert logits(model, IDS % 40).shape == (BATCH, POS, 50)


def test_overrides_of_a_part_are_merged_with_those_of_the_family() -> None:
    config = tiny("muse_spark", text_config={"moe_intermediate_size": 12}).config.text_config
    assert config.moe_intermediate_size == 12
    assert config.moe_hidden_size == 20  # the family's own override is still there


def test_any_config_can_be_shrunk() -> None:
    config = shrink(CONFIG_MAPPING["bert"])
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (32, 3, 101)
    config = shrink(CONFIG_MAPPING["llama"], {"hidden_size": 48})
    assert (config.hidden_size, config.intermediate_size) == (48, 40)


def test_the_text_part_is_found_by_its_own_model_type_too() -> None:
    assert type(tiny("gemma3_text")) is type(tiny("gemma3"))


def test_a_model_outside_the_table_gets_the_general_recipe() -> None:
    out = logits(tiny("mamba"))
    assert torch.isfinite(out).all()


def test_bfloat16_is_the_same_model_rounded() -> None:
    full, half = tiny("qwen2_moe"), tiny("qwen2_moe", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    wide = dict(full.named_parameters())
    for name, weight in half.named_parameters():
        # twice rounded (before and after the noise): two steps of bfloat16's 8 bits
        torch.testing.assert_close(weight.float(), wide[name], atol=0, rtol=2**-7, msg=name)


def test_torch_s_global_random_state_is_left_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    tiny("llama")
    assert torch.equal(torch.rand(4), expected)


def test_a_wrong_name_is_met_with_a_near_one() -> None:
    with pytest.raises(ValueError, match=r"tiny\('olmoee'\).*did you mean olmoe"):
        tiny("olmoee")


@pytest.mark.parametrize("name", ["switch_transformers", "bert", "openai_privacy_filter"])
def test_what_is_no_causal_language_model_is_refused_with_the_reason(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}.*not a causal language model"):
        tiny(name)


def test_a_model_without_a_language_modelling_head_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tiny\('clip'\): transformers has no causal language model"):
        tiny("clip")


def test_the_examples_in_the_docstrings_run() -> None:
    module = importlib.import_module("interp.zoo.tiny")
    result = doctest.testmod(module)
    assert result.attempted >= 2
    assert result.failed == 0
