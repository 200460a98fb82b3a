"""What must hold between TransformerLens and us, on every line of TransformerLens that we support.

Each `check_*` stands for itself. pytest calls them in its own process on the installed TransformerLens; run as a
script, with another line first on the path, all are run and the last line of output is a JSON object of their outcomes.
"""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from typing import Any

import torch

import interp
from interp import edits
from interp.bridges.transformer_lens import cache_name, from_bridge, unwrapped
from interp.sites import KINDS, Site
from interp.zoo.errors import LoadError
from interp.zoo.tiny import tiny

FAMILIES = ("llama", "olmoe", "gpt2")
IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])
TEXT = "The capital of France is"


class Unavailable(Exception):
    """This check cannot run here; the text says why."""


# -- material --------------------------------------------------------------------------------------------------------
def small_tokenizer(vocab: int = 101) -> Any:
    """Words w3 .. w100, for the small models' vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<unk>": 1, "<eos>": 2} | {f"w{i}": i for i in range(3, vocab)}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<eos>", pad_token="<pad>")


def boot(family: str, **config: Any) -> Any:
    """A TransformerBridge on a small random model of a family."""
    hf = tiny(family, **config)
    return boot_on(hf, f"tiny-{family}", small_tokenizer())


def boot_on(hf: Any, name: str, tokenizer: Any) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    hf.config.architectures = [type(hf).__name__]  # a checkpoint has it; a model from a bare config has not
    return TransformerBridge.boot_transformers(
        name, hf_model=hf, tokenizer=tokenizer, device="cpu", dtype=torch.float32
    )


@cache
def ran(family: str) -> tuple[Any, Any, interp.Model]:
    """(a bridge, its own cache of a run on IDS, the plain model with the same weights)."""
    bridge = boot(family)
    with torch.no_grad():
        _, cached = bridge.run_with_cache(IDS)
    return bridge, cached, interp.Model(tiny(family), small_tokenizer(), name=family)


def every_site(m: interp.Model) -> list[str]:
    return [
        f"{name}[*]" if kind.layered else name
        for name, kind in KINDS.items()
        if any(present == name for present, _ in m.anatomy.places)
    ]


def close(ours: torch.Tensor, theirs: torch.Tensor, what: str) -> None:
    assert ours.shape == theirs.shape, f"{what}: {list(ours.shape)} here, {list(theirs.shape)} there"
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4), (
        f"{what}: off by {float((ours - theirs).abs().max()):.2g}"
    )


@contextmanager
def refused(error: type[Exception], *words: str) -> Iterator[None]:
    """The block must raise `error` with all these words in its message."""
    message = None
    try:
        yield
    except error as found:
        message = str(found)
    assert message is not None, f"{error.__name__} was not raised"
    missing = [w for w in words if w not in message]
    assert not missing, f"the message lacks {missing}: {message}"


# -- out: to_transformer_lens --------------------------------------------------------------------------------------
def check_cache_is_the_bridges_own() -> None:
    """Everything we capture stands under the name, and has the values, that it has in a cache of TransformerLens."""
    for family in FAMILIES:
        _, theirs, m = ran(family)
        acts = m.capture(IDS, every_site(m), logits=True)
        ours = acts.to_transformer_lens()
        assert type(ours) is type(theirs)
        named = [site for site in acts.sites if site.tl_name]
        assert {site.name for site in named} >= {
            "embed",
            "resid_pre",
            "resid_mid",
            "resid_post",
            "attn_out",
            "mlp_out",
            "q",
            "k",
            "v",
            "pattern",
            "z",
            "ln1_scale",
            "ln2_scale",
            "ln_final_scale",
        }
        for site in named:
            key = cache_name(site, acts.rotary)
            close(ours[key], theirs[key], f"{family} {key}")
        for site in acts.sites:
            if site.tl_name is None:
                assert ours[str(site)] is acts.tensors[site]
        assert ("expert_hidden[1]" in ours.keys()) == (family == "olmoe")  # noqa: SIM118 - iterates its keys, has no __contains__


def check_queries_and_keys_by_rotation() -> None:
    """Under the rotated names where the model rotates, under the plain ones where it does not; never both."""
    for family, kind in (("llama", "rot_"), ("gpt2", "")):
        _, theirs, m = ran(family)
        ours = m.capture(IDS, ["q[1]", "k[1]"]).to_transformer_lens()
        assert set(ours.keys()) == {f"blocks.1.attn.hook_{kind}q", f"blocks.1.attn.hook_{kind}k"}
        close(ours[f"{kind}q", 1], theirs[f"{kind}q", 1], f"{family} q")


def check_shorthand_and_stacks() -> None:
    for family in FAMILIES:
        _, theirs, m = ran(family)
        acts = m.capture(IDS, ["resid_post[*]", "z[*]", "ln1_scale[*]", "ln_final_scale"])
        ours = acts.to_transformer_lens()
        assert ours["resid_post", 2] is acts["resid_post[2]"]
        assert ours["resid_post", -1] is acts["resid_post[2]"]
        assert torch.equal(ours.stack_activation("resid_post"), acts["resid_post[*]"])
        close(ours.stack_activation("z"), theirs.stack_activation("z"), "z")
        close(ours["scale", 1, "ln1"], theirs["scale", 1, "ln1"], "ln1")
        close(ours["scale"], theirs["scale"], "final scale")


def check_residual_decompositions() -> None:
    """The parts sum to the residual stream (learned positions included) and are those that TransformerLens finds."""
    for family in FAMILIES:
        _, theirs, m = ran(family)
        acts = m.capture(IDS, ["embed", "resid_pre[*]", "resid_mid[*]", "resid_post[*]", "attn_out[*]", "mlp_out[*]"])
        ours = acts.to_transformer_lens()
        parts, labels = ours.decompose_resid(return_labels=True)
        their_parts, their_labels = theirs.decompose_resid(return_labels=True)
        assert labels == their_labels
        assert ("pos_embed" in labels) == (family == "gpt2")
        close(parts, their_parts, "decompose_resid")
        close(parts.sum(0), acts["resid_post[-1]"], "the sum of the parts")
        whole, labels = ours.accumulated_resid(incl_mid=True, return_labels=True)
        their_whole, their_labels = theirs.accumulated_resid(incl_mid=True, return_labels=True)
        assert labels == their_labels
        close(whole, their_whole, "accumulated_resid")


def check_norms_need_a_model() -> None:
    """Without a model apply_ln is refused with the mend, never skipped; with ours or a bridge it is the bridge's."""
    for family in FAMILIES:
        bridge, theirs, m = ran(family)
        acts = m.capture(
            IDS, ["embed", "resid_pre[*]", "resid_post[*]", "attn_out[*]", "mlp_out[*]", "z[*]", "ln_final_scale"]
        )
        with refused(AttributeError, "normalization_type", "to_transformer_lens(model=...)"):
            acts.to_transformer_lens().accumulated_resid(apply_ln=True)
        for model in (m, bridge):
            ours = acts.to_transformer_lens(model)
            close(
                ours.accumulated_resid(apply_ln=True), theirs.accumulated_resid(apply_ln=True), f"{family} accumulated"
            )
            close(ours.decompose_resid(apply_ln=True), theirs.decompose_resid(apply_ln=True), f"{family} decomposed")
        close(acts.to_transformer_lens(bridge).stack_head_results(), theirs.stack_head_results(), f"{family} heads")
        with refused(AttributeError, "blocks", "TransformerBridge"):
            acts.to_transformer_lens(m).stack_head_results()


def check_partial_captures() -> None:
    """Layers count from a model that is given; parts of a site keep our name; rows of one expert are left out aloud."""
    _, _, m = ran("olmoe")
    acts = m.capture(IDS[:1], ["resid_post[0:2]", "z[1, head=2]", "expert_out[1, expert=3]"])
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        ours = acts.to_transformer_lens()
    assert any("expert_out[1, expert=3]" in str(w.message) and "left out" in str(w.message) for w in heard)
    assert "expert_out[1, expert=3]" not in ours.keys()  # noqa: SIM118
    assert ours["resid_post", -1] is acts["resid_post[1]"]
    assert torch.equal(ours["z[1, head=2]"], m.capture(IDS[:1], "z[1]")["z[1]"][:, :, 2])
    with refused(KeyError, "blocks.2.hook_resid_post"):
        m.capture(IDS, "resid_post[0:2]").to_transformer_lens(m)["resid_post", -1]
    single = ours.remove_batch_dim()
    assert single["resid_post", 1].shape == (6, 32)
    assert single["expert_ids[1]"].shape == (6, 2)


# -- in: from_bridge -------------------------------------------------------------------------------------------------
def shape_of(module: torch.nn.Module) -> dict[str, Any]:
    """What could show that somebody has been there: classes, hooks, settings, modes."""
    found: dict[str, Any] = {}
    for name, child in module.named_modules():
        hooks = [len(child._forward_hooks), len(child._forward_pre_hooks)]
        config = getattr(child, "config", None)
        found[name] = (
            type(child),
            hooks,
            getattr(config, "_attn_implementation_internal", None),
            getattr(config, "_experts_implementation_internal", None),
            "forward" in vars(child),
            child.training,
        )
    return found


def check_every_site_on_a_bridge() -> None:
    """A bridge opens with all the sites and values of the plain model; where names meet, they are the bridge's."""
    for family in FAMILIES:
        _, theirs, plain = ran(family)
        m = interp.load(boot(family))
        assert m.map().drop(columns="absent").equals(plain.map().drop(columns="absent"))
        got, wanted = (model.capture(IDS, every_site(plain), logits=True) for model in (m, plain))
        assert got.sites == wanted.sites
        for site in got.sites:
            close(got.tensors[site].float(), wanted.tensors[site].float(), f"{family} {site}")
            if site.tl_name:
                close(got.tensors[site], theirs[cache_name(site, got.rotary)], f"{family} {site} against the bridge")
        assert got.logits is not None
        assert wanted.logits is not None
        close(got.logits, wanted.logits, f"{family} logits")


def check_weights_are_shared() -> None:
    """No copy; a change in place shows on both sides."""
    bridge = boot("olmoe")
    m = interp.load(bridge)
    owned = {p.data_ptr() for p in bridge.original_model.parameters()}
    assert {p.data_ptr() for p in m.hf.parameters()} <= owned
    before = m(IDS)
    with torch.no_grad():
        m.hf.model.layers[1].mlp.experts.down_proj.mul_(2)
        after, theirs = m(IDS), bridge(IDS)
    assert not torch.allclose(before, after)
    close(after, theirs, "logits after the change")


def check_bridge_is_left_alone() -> None:
    """Opening, capturing and editing change nothing on the bridge, and its hooks nothing on the model."""
    bridge = boot("llama")
    hf = bridge.original_model
    hf.model.layers[1].train()  # the mode of each module is somebody's choice, too
    with torch.no_grad():
        logits, shape = bridge(IDS), shape_of(hf)
    m = from_bridge(bridge)
    assert not any(type(x).__module__.startswith("transformer_lens") for x in m.hf.modules())
    assert m.hf is not hf
    assert m.hf.config is not hf.config
    m.capture(IDS, ["q[1]", "pattern[1]", "resid_post[*]"])
    with torch.no_grad(), m.intervene(edits.zero("attn_out[1]"), edits.zero("mlp_hidden[1]")):
        assert shape_of(hf) == shape  # not even for the while
        assert not torch.allclose(m(IDS), logits)
        assert torch.equal(bridge(IDS), logits)
    assert shape_of(hf) == shape
    with torch.no_grad():
        own = m(IDS)
        with bridge.hooks(fwd_hooks=[("blocks.1.hook_attn_out", lambda tensor, hook: tensor * 0)]):
            assert torch.equal(m(IDS), own)
        assert torch.equal(bridge(IDS), logits)


def check_name_tokenizer_and_text() -> None:
    bridge = boot("llama")
    m = interp.load(bridge)
    assert m.name == bridge.cfg.model_name
    assert m.tokenizer is bridge.tokenizer
    assert m.card["source"] == "bridge"
    close(m("w5 w6 w7"), bridge(torch.tensor([[5, 6, 7]])).detach(), "logits of a text")
    assert m.generate("w5 w6", max_new_tokens=3).new_ids.shape == (1, 3)


def check_processed_weights() -> None:
    """In compatibility mode a bridge opens on its processed weights, or is refused if no plain model computes them."""
    bridge = boot("llama")
    bridge.enable_compatibility_mode(disable_warnings=True)
    m = interp.load(bridge)
    assert m.card["compatibility_mode"] is True
    assert torch.equal(m.hf.model.norm.weight, torch.ones(32)), "the final norm should be folded"
    with torch.no_grad():
        logits, cached = bridge.run_with_cache(IDS)
    close(m(IDS), logits, "logits")
    acts = m.capture(IDS, ["resid_post[*]", "pattern[*]", "ln2_scale[*]"])
    for site in acts.sites:
        close(acts.tensors[site], cached[cache_name(site, True)], str(site))
    fused = boot("gpt2")
    fused.enable_compatibility_mode(disable_warnings=True)
    with refused(LoadError, "enable_compatibility_mode", "one matrix"):
        interp.load(fused)
    interp.load(boot("gpt2"))  # unprocessed, the same family opens


def check_disagreement_is_refused() -> None:
    """DeepSeek V3 is computed wrongly by TransformerLens 3.9, which must not go by unseen, and rightly by 4."""
    bridge = boot("deepseek_v3")
    if version("transformer-lens").startswith("3."):
        with refused(LoadError, "differ by", "interp.load"):
            interp.load(bridge)
    else:
        m = interp.load(bridge)
        close(m(IDS), bridge(IDS).detach(), "logits")
    edited = boot("llama")
    edited.add_hook("blocks.1.hook_resid_post", lambda tensor, hook: tensor * 0)
    with refused(LoadError, "differ by", "hooks"):
        interp.load(edited)


def check_bridges_that_do_not_run_or_lack_parts() -> None:
    """Layers without attention (Jamba) open; a bridge whose own forward pass fails is refused with the reason."""
    m = interp.load(boot("jamba"))
    plain = interp.Model(tiny("jamba"))
    assert m.anatomy.having("q") == plain.anatomy.having("q") != list(range(m.n_layers))
    assert m.anatomy.having("expert_out") == plain.anatomy.having("expert_out")
    broken = boot("llama")
    broken.add_hook("blocks.1.hook_resid_post", lambda tensor, hook: tensor[1 / 0])
    with refused(LoadError, "failed", "ZeroDivisionError"):
        interp.load(broken)


def check_forwards_put_on_objects() -> None:
    """Forwards that TransformerLens put on single modules (Falcon) stay behind; anybody else's are refused."""
    bridge = boot("falcon")
    patched = [x for x in bridge.original_model.modules() if "forward" in vars(x)]
    assert patched, "TransformerLens no longer patches Falcon; this check needs another family"
    m = interp.load(bridge)
    assert not any("forward" in vars(x) for x in m.hf.modules())
    close(m(IDS), bridge(IDS).detach(), "logits")
    lone = torch.nn.Sequential(torch.nn.Linear(2, 2))
    lone[0].forward = lambda x: x
    with refused(LoadError, "Linear", "replaced on the object"):
        unwrapped(lone)


def check_smollm2() -> None:
    """The real model: a text, in and out."""
    try:
        plain, booted = interp.load("smollm2"), interp.load("smollm2")
    except LoadError as error:
        raise Unavailable(f"SmolLM2 cannot be had here: {error}") from None
    bridge = boot_on(booted.hf, "smollm2", booted.tokenizer)
    m = interp.load(bridge)
    names = ["resid_post[15]", "q[3]", "k[3]", "pattern[29]", "mlp_hidden[7]", "ln_final_scale"]
    acts = plain.capture(TEXT, names)
    keys = [cache_name(Site.parse(name), True) for name in names]
    with torch.no_grad():
        _, theirs = bridge.run_with_cache(acts.tokens.ids, names_filter=keys)
    ours, opened = acts.to_transformer_lens(), m.capture(acts.tokens, names)
    for name, key in zip(names, keys, strict=True):
        scale = float(theirs[key].abs().max())
        close(ours[key] / scale, theirs[key] / scale, key)
        close(opened[name] / scale, theirs[key] / scale, key)
    assert m.tokenizer.decode(m(acts.tokens)[0, -1].argmax()) == " Paris"


CHECKS = {
    name.removeprefix("check_"): function for name, function in list(globals().items()) if name.startswith("check_")
}


def main() -> None:
    """Runs every check and prints their outcomes, and the line they ran on, as one JSON object."""
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    outcomes = {"line": version("transformer-lens")}
    for name, check in CHECKS.items():
        torch.manual_seed(0)
        try:
            check()
            outcomes[name] = "passed"
        except Unavailable as reason:
            outcomes[name] = f"skipped: {reason}"
        except Exception:
            outcomes[name] = traceback.format_exc()
    sys.stdout.write(f"\n{json.dumps(outcomes)}\n")


if __name__ == "__main__":
    main()
