"""Whatever happens inside a context, afterwards the model is as it was, bit for bit."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from interp import edits
from interp.edits import Edit
from interp.model import Model
from interp.sites import KINDS, Site
from interp.zoo.tiny import tiny

IDS = torch.randint(3, 90, (2, 8), generator=torch.Generator().manual_seed(1))
#: One family for each way in: the two interfaces, attention written out, experts outside the interface, in-place sums.
FAMILIES = ["llama", "gpt_oss", "gpt2", "bloom", "falcon", "jetmoe", "qwen2_moe"]


def state(hf: nn.Module) -> dict[str, Any]:
    """Everything of a model that somebody could leave changed."""
    configs = {id(c): c for module in hf.modules() if (c := getattr(module, "config", None)) is not None}
    torch.manual_seed(0)  # for dropout
    with torch.no_grad():
        logits = hf(input_ids=IDS, attention_mask=torch.ones_like(IDS), use_cache=False).logits
    digest = hashlib.sha256()
    for _, tensor in sorted({**dict(hf.named_parameters()), **dict(hf.named_buffers())}.items()):
        digest.update(tensor.detach().float().numpy().tobytes())
    return {
        "hooks": {
            name: [len(value) for key, value in vars(module).items() if "hook" in key and isinstance(value, dict)]
            for name, module in hf.named_modules()
        },
        "attributes": {name: sorted(vars(module)) for name, module in hf.named_modules()},
        "classes": [type(module) for module in hf.modules()],
        "forwards": [vars(module).get("forward") for module in hf.modules()],
        "configs": [{k: (type(v), repr(v)) for k, v in vars(c).items()} for c in configs.values()],
        "training": [module.training for module in hf.modules()],
        "gradients": [(p.requires_grad, p.grad is None) for p in hf.parameters()],
        "weights": digest.hexdigest(),
        "logits": logits,
    }


def assert_restored(hf: nn.Module, before: dict[str, Any]) -> None:
    after = state(hf)
    for key, value in before.items():
        assert torch.equal(value, after[key]) if isinstance(value, Tensor) else value == after[key], key


class Oops(Exception):
    """Nothing else raises this."""


def oops(h: Tensor, where: Any) -> Tensor:
    raise Oops(where.site)


@pytest.fixture(scope="module")
def models() -> dict[str, Model]:
    return {name: Model(tiny(name), name=name) for name in FAMILIES}


@pytest.fixture
def m(models: dict[str, Model]) -> Iterator[Model]:
    """A model that every test must leave as it found it."""
    before = state(models["llama"].hf)
    yield models["llama"]
    assert_restored(models["llama"].hf, before)


def patterns(m: Model) -> list[str]:
    return [f"{n}[*]" if KINDS[n].layered else n for n in sorted({name for name, _ in m.anatomy.places})]


@pytest.mark.parametrize("family", FAMILIES)
def test_looking_for_the_parts_leaves_no_trace(family: str) -> None:
    hf = tiny(family)
    hf.train()
    next(m for m in hf.modules() if isinstance(m, nn.ModuleList))[0].eval()  # one layer in another mode than the rest
    hf.get_input_embeddings().weight.requires_grad_(False)
    before = state(hf)
    assert Model(hf).n_layers == 3
    assert_restored(hf, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_reading_and_writing_everything_leaves_no_trace(models: dict[str, Model], family: str) -> None:
    m = models[family]
    before = state(m.hf)
    m.capture(IDS, patterns(m), logits=True)
    m.capture(IDS, patterns(m)[-3:], grad=True)
    with m.intervene([edits.scale(p, 1.5) for p in patterns(m) if not p.startswith(("expert_ids", "shared_weight"))]):
        m(IDS)
        m.generate(IDS, max_new_tokens=2, eos_token_id=None)
    m.generate(IDS, max_new_tokens=2, eos_token_id=None, capture=patterns(m))
    assert_restored(m.hf, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_edit_that_fails_at_any_site_leaves_no_trace(models: dict[str, Model], family: str) -> None:
    m = models[family]
    before = state(m.hf)
    for name in sorted({n for n, _ in m.anatomy.places}):
        site = str(Site(name, 1 if KINDS[name].layered else None))
        with pytest.raises(Oops), m.intervene(Edit(site, oops)):
            m(IDS)
        with pytest.raises(Oops), m.intervene(Edit(site, oops)):
            m.generate(IDS, max_new_tokens=2, eos_token_id=None, capture="resid_post[0]")
        with pytest.raises(Oops), m.intervene(Edit(site, oops)):
            m.capture(IDS, site, grad=True)
    assert_restored(m.hf, before)


@pytest.mark.parametrize("error", [Oops, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_whatever_the_user_raises_inside_leaves_no_trace(m: Model, error: type[BaseException]) -> None:
    def fail() -> None:
        with m.intervene(edits.zero("z[*]")), m.recording("q[*]"):
            m(IDS)
            raise error

    with pytest.raises(error):
        fail()


def test_a_failure_inside_leaves_the_contexts_around_it_in_force(m: Model) -> None:
    with m.intervene(edits.zero("resid_post[1]")):
        want = m(IDS)
        with pytest.raises(Oops), m.intervene(Edit("z[0]", oops)):
            m(IDS)
        assert torch.equal(m(IDS), want)
        with pytest.raises(ValueError, match="expected one of"):
            edits.zero("z[0]", scope="nowhere")
        with pytest.raises(ValueError, match="llama has layers"), m.intervene(edits.zero("z[7]")):
            pass
        assert torch.equal(m(IDS), want)


def test_a_model_that_itself_fails_is_restored_and_works_again(m: Model) -> None:
    def refuse(module: nn.Module, args: Any) -> None:
        raise Oops

    handle = m.anatomy.layers[2].register_forward_pre_hook(refuse)
    with pytest.raises(Oops), m.intervene(edits.zero("z[*]")):
        m.capture(IDS, "resid_post[2]")
    handle.remove()


def test_contexts_may_be_left_in_any_order(m: Model) -> None:
    plain = m(IDS)
    first, second = m.intervene(edits.add("resid_post[1]", 1.0)), m.intervene(edits.scale("resid_post[1]", 2.0))
    want = m.capture(IDS, "resid_post[1]")["resid_post[1]"]
    first.__enter__()
    second.__enter__()
    torch.testing.assert_close(m.capture(IDS, "resid_post[1]")["resid_post[1]"], 2 * (want + 1))
    first.__exit__(None, None, None)
    torch.testing.assert_close(m.capture(IDS, "resid_post[1]")["resid_post[1]"], 2 * want)
    second.__exit__(None, None, None)
    assert torch.equal(m(IDS), plain)


def test_hooks_of_others_stay_and_see_what_the_edits_leave(m: Model) -> None:
    seen: list[Tensor] = []
    handle = m.anatomy.layers[2].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with m.intervene(edits.replace("resid_post[1]", 3.0)):
        m(IDS)
    m(IDS)
    handle.remove()
    assert bool((seen[0] == 3).all())
    assert not bool((seen[1] == 3).all())


def test_an_implementation_chosen_by_the_user_comes_back(m: Model) -> None:
    for name in ("eager", "sdpa"):
        m.hf.set_attn_implementation(name)
        with m.intervene(edits.zero("pattern[1]")):
            m(IDS)
        assert m.hf.config._attn_implementation == name
        assert type(m.hf.config._attn_implementation) is str


# -- several models at once ------------------------------------------------------------------------------------
def together(*works: Callable[[], Any]) -> list[Any]:
    """Runs works in threads that start at the same moment."""
    barrier = threading.Barrier(len(works))

    def run(work: Callable[[], Any]) -> Any:
        barrier.wait()
        return work()

    with ThreadPoolExecutor(len(works)) as pool:
        return [f.result() for f in [pool.submit(run, w) for w in works]]


def work(m: Model, seed: int) -> Callable[[], list[Tensor]]:
    """Edits, captures and a generation, a few times over."""

    def run() -> list[Tensor]:
        out: list[Tensor] = []
        for i in range(4):
            v = torch.randn(m.d_model, generator=torch.Generator().manual_seed(seed + i))
            with m.intervene(edits.add("resid_post[1]", v), edits.scale("z[0, head=1]", float(i))):
                acts = m.capture(IDS, ["pattern[1]", "q[2]", "resid_post[2]"], logits=True)
                out += [*acts.values(), m(IDS), m.generate(IDS, max_new_tokens=3, eos_token_id=None).new_ids]
            if m.n_experts:
                out.append(m.capture(IDS, "expert_out[1]")["expert_out[1]"])
        return out

    return run


@pytest.mark.parametrize(("one", "other"), [("llama", "llama"), ("olmoe", "olmoe"), ("bloom", "gpt_oss")])
def test_two_threads_on_two_models_do_not_meet(one: str, other: str) -> None:
    models = [Model(tiny(one, seed=1), name="one"), Model(tiny(other, seed=2), name="other")]
    before = [state(m.hf) for m in models]
    alone = [work(m, 10 * i)() for i, m in enumerate(models)]
    both = together(*(work(m, 10 * i) for i, m in enumerate(models)))
    for want, got in zip(alone, both, strict=True):
        assert len(want) == len(got)
        assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    for m, was in zip(models, before, strict=True):
        assert_restored(m.hf, was)


def test_one_model_in_two_threads_is_refused() -> None:
    m = Model(tiny("llama"), name="mine")
    with m.intervene(edits.zero("z[0, head=1]")):
        inside = m(IDS)

        def other() -> None:
            with pytest.raises(RuntimeError, match="mine is in use in another thread"):
                m.capture(IDS, "resid_post[1]")

        together(other)
        assert torch.equal(m(IDS), inside)  # the open context is untouched
    together(lambda: m.capture(IDS, "resid_post[1]"))  # afterwards any thread may use it


@pytest.mark.parametrize("family", ["llama", "olmoe"])
def test_two_models_may_share_one_config_object(family: str) -> None:
    first = tiny(family, seed=1)
    second = type(first)(first.config).eval()
    assert second.config is first.config
    models = [Model(first, name="first"), Model(second, name="second")]
    before = [state(m.hf) for m in models]
    a, b = (m.intervene(edits.zero("z[1]")) for m in models)
    a.__enter__()
    b.__enter__()
    inside = [m.capture(IDS, ["z[1]", "q[1]"]) for m in models]
    a.__exit__(None, None, None)
    assert not bool(models[1].capture(IDS, "z[1]")["z[1]"].any()), "leaving one switched the other off"
    assert bool(models[0].capture(IDS, "z[1]")["z[1]"].any())
    b.__exit__(None, None, None)
    assert not any(bool(acts["z[1]"].any()) for acts in inside)
    with models[0].intervene(edits.zero("pattern[1]")), models[1].intervene(edits.zero("z[1]")):
        assert not bool(models[0].capture(IDS, "pattern[1]")["pattern[1]"].any())
        assert not bool(models[1].capture(IDS, "z[1]")["z[1]"].any())
    for m, was in zip(models, before, strict=True):
        assert_restored(m.hf, was)


def test_two_threads_may_not_share_one_config_object() -> None:
    first = tiny("llama", seed=1)
    models = [Model(first, name="first"), Model(type(first)(first.config).eval(), name="second")]
    models[1].resolve("z[1]")
    before = state(first)
    message = "two threads run models that share one LlamaConfig object; build each model from a copy"
    with models[0].intervene(edits.zero("z[1]")), pytest.raises(RuntimeError, match=message):
        together(lambda: models[1].capture(IDS, "z[1]"))
    assert_restored(first, before)
