"""The grammar of places: what is printed can be read, what cannot be read says why, patterns mean what they say."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from interp.model import Model
from interp.sites import KINDS, Kind, Pattern, Site, SiteError
from interp.zoo.tiny import tiny

LAYERED = [k for k in KINDS.values() if k.layered]
NAMED = [k for k in KINDS.values() if k.tl]


@st.composite
def indices(draw: st.DrawFn, kind: Kind) -> tuple[tuple[str, int], ...]:
    """Keys of this kind, no two on one axis, in any order."""
    keys = draw(st.lists(st.sampled_from(sorted(kind.index)), unique_by=lambda k: kind.index[k])) if kind.index else []
    return tuple((key, draw(st.integers(-9, 300))) for key in keys)


@st.composite
def sites(draw: st.DrawFn) -> Site:
    kind = draw(st.sampled_from(list(KINDS.values())))
    layer = draw(st.integers(-200, 200)) if kind.layered else None
    return Site(kind.name, layer, draw(indices(kind)))


@pytest.fixture(scope="module")
def llama() -> Model:
    return Model(tiny("llama"), name="llama")


@pytest.fixture(scope="module")
def deepseek() -> Model:
    """A model whose first layer is dense and whose others are mixtures of experts."""
    return Model(tiny("deepseek_v3"), name="deepseek")


@given(sites())
def test_what_is_printed_reads_back(site: Site) -> None:
    assert Site.parse(str(site)) == site
    assert Pattern.parse(str(site)).concrete
    assert str(site.base) == str(replace(site, index=()))


@given(sites(), st.sampled_from(["", " ", "  "]))
def test_spaces_mean_nothing(site: Site, space: str) -> None:
    text = str(site)
    for mark in "[],=":
        text = text.replace(mark, f"{space}{mark}{space}")
    assert Site.parse(text) == site


@given(st.sampled_from(NAMED), st.integers(0, 99))
def test_names_of_transformer_lens_read_both_ways(kind: Kind, layer: int) -> None:
    site = Site(kind.name, layer if kind.layered else None)
    assert site.tl_name is not None
    assert Site.parse(site.tl_name) == site


@given(st.sampled_from([k for k in NAMED if k.layered]))
def test_a_name_of_transformer_lens_with_a_star_is_a_pattern(kind: Kind) -> None:
    assert kind.tl is not None
    pattern = Pattern.parse(kind.tl.replace("{l}", "*"))
    assert not pattern.concrete
    assert pattern == Pattern.parse(f"{kind.name}[*]")


def test_only_places_that_transformer_lens_has_carry_a_name_of_it() -> None:
    without = {k.name for k in KINDS.values() if k.tl is None}
    routing = {"router_logits", "expert_ids", "expert_weight", "expert_hidden", "expert_out"}
    factored = {"key_logits1", "key_logits2", "g1", "g2", "z1", "z2"}
    assert without == {*routing, *factored, "shared_weight", "shared_out", "logits"}
    assert Site("expert_out", 3).tl_name is None


def test_queries_before_rotary_are_refused_where_the_model_rotates_them() -> None:
    with pytest.raises(SiteError, match=r"before rotary.*hook_rot_q"):
        Site.parse("blocks.2.attn.hook_q", rotary=True)
    with pytest.raises(SiteError, match=r"q\[2\]"):
        Site.parse("blocks.2.attn.hook_q")
    assert Site.parse("blocks.2.attn.hook_q", rotary=False) == Site("q", 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("resid_posst[5]", r"'resid_posst' is not a site name \(did you mean 'resid_post'\?\); the names are embed, "),
        ("resid_post", r"'resid_post': resid_post lives in layers; write resid_post\[5\] or resid_post\[\*\]"),
        ("resid_post[]", r"lives in layers"),
        ("z[head=3]", r"'z\[head=3\]': z lives in layers"),
        ("resid_post[five]", r"layer 'five' is neither a number, nor '\*', nor a slice such as 2:6"),
        ("resid_post[1.5]", r"layer '1.5' is neither a number"),
        ("q[::0]", r"'q\[::0\]': the step of a slice must not be 0"),
        ("resid_post[5, head=3]", r"'head=3' does not narrow resid_post, which takes dim="),
        ("ln1_scale[5, dim=3]", r"'dim=3' does not narrow ln1_scale, which takes no index"),
        ("embed[5]", r"'5' does not narrow embed, which takes dim="),
        ("z[5, 3]", r"'3' does not narrow z, which takes head=, dim="),
        ("z[5, head=three]", r"head='three' is neither a number nor '\*'"),
        ("z[5, head=1, head=2]", r"head= and head= both pick from 'head'; give one"),
        ("g1[5, expert=1]", r"'expert=1' does not narrow g1, which takes head=, key="),
        ("z1[5, head=1]", r"'head=1' does not narrow z1, which takes key=, neuron="),
        ("expert_out[5, expert=1, slot=0]", r"expert= and slot= both pick from 'slot'; give one"),
        ("z[5", r"'z\[5' is not a site; the form is name\[layer, key=index\], e\.g\. 'z\[5, head=3\]'"),
        ("z[5]]", r"is not a site; the form is"),
        ("", r"'' is not a site"),
        ("blocks.5.hook_nothing", r"no site stands for this TransformerLens name; known are blocks.L"),
        (5, r"site 5: a site is a text such as 'resid_post\[5\]', not int"),
    ],
)
def test_what_cannot_be_read_names_the_text_and_the_mend(text: str, message: str) -> None:
    with pytest.raises(SiteError, match=message):
        Pattern.parse(text)


def test_a_pattern_is_no_site() -> None:
    for text in ("z[*]", "z[1:3]", "z[1, head=*]"):
        with pytest.raises(SiteError, match=r"names many sites; here one is needed, such as 'z\[0\]'"):
            Site.parse(text)


def test_a_site_narrows_and_tells_its_axes() -> None:
    assert Site.parse("z[5]").axes == ("batch", "pos", "head", "d_head")
    assert Site.parse("z[5]").at(head=3) == Site.parse("z[5, head=3]")
    assert Site.parse("z[5, head=3]").axes == ("batch", "pos", "d_head")
    assert Site.parse("pattern[5, head=0]").axes == ("batch", "query", "key")
    assert Site.parse("expert_out[5, expert=1]").axes == ("row", "d_model")
    assert Site.parse("expert_hidden[5, expert=1, neuron=2]").axes == ("row",)
    assert Site.parse("expert_out[5, slot=1]").axes == ("batch", "pos", "d_model")
    assert Site.parse("router_logits[5, expert=1]").axes == ("batch", "pos")
    assert Site.parse("g1[5]").axes == Site.parse("key_logits2[5]").axes == ("batch", "pos", "head", "key")
    assert Site.parse("g2[5, key=1]").axes == ("batch", "pos", "head")
    assert Site.parse("z1[5, key=1]").axes == ("batch", "pos", "neuron")


def test_sites_sort_in_the_order_of_a_forward_pass() -> None:
    order = [
        "embed",
        "resid_pre[0]",
        "q[0]",
        "pattern[0]",
        "z[0]",
        "attn_out[0]",
        "resid_mid[0]",
        "mlp_out[0]",
        "resid_post[0]",
        "resid_pre[1]",
        "ln_final_scale",
        "logits",
    ]
    assert [str(s) for s in sorted(map(Site.parse, reversed(order)))] == order


# -- on a model ------------------------------------------------------------------------------------------------
def names(m: Model, *patterns: str) -> list[str]:
    return [str(s) for s in m.resolve(list(patterns))]


@pytest.mark.parametrize(
    ("pattern", "layers"),
    [
        ("*", [0, 1, 2]),
        ("-1", [2]),
        ("-3", [0]),
        (":", [0, 1, 2]),
        ("1:", [1, 2]),
        (":-1", [0, 1]),
        ("-2:", [1, 2]),
        ("::2", [0, 2]),
        ("0:9", [0, 1, 2]),
    ],
)
def test_a_pattern_of_layers_means_what_a_list_would_give(llama: Model, pattern: str, layers: list[int]) -> None:
    assert names(llama, f"resid_post[{pattern}]") == [f"resid_post[{i}]" for i in layers]


def test_a_star_in_an_index_counts_through_its_axis(llama: Model) -> None:
    assert names(llama, "z[1, head=*]") == [f"z[1, head={h}]" for h in range(4)]
    assert names(llama, "k[1, head=*]") == [f"k[1, head={h}]" for h in range(2)]  # key-value heads as they are
    assert len(names(llama, "z[*, head=*]")) == 12
    assert len(names(llama, "mlp_hidden[2, neuron=*]")) == 40
    assert names(llama, "z[1, head=-1]") == ["z[1, head=3]"]


def test_a_site_named_twice_comes_once(llama: Model) -> None:
    assert names(llama, "resid_post[-1]", "blocks.2.hook_resid_post", "resid_post[*]") == [
        "resid_post[2]",
        "resid_post[0]",
        "resid_post[1]",
    ]


def test_patterns_take_the_layers_that_have_the_site(deepseek: Model) -> None:
    assert names(deepseek, "mlp_hidden[*]") == ["mlp_hidden[0]"]
    assert names(deepseek, "expert_out[*]") == ["expert_out[1]", "expert_out[2]"]
    assert names(deepseek, "expert_out[-2:]") == ["expert_out[1]", "expert_out[2]"]
    assert len(names(deepseek, "expert_out[1, expert=*]")) == deepseek.n_experts


def test_slices_count_in_the_models_layers_not_in_those_that_have_the_site(deepseek: Model) -> None:
    with pytest.raises(SiteError, match=r"mlp_hidden\[-1:\]: deepseek has no such site: layer 2 is a mixture of"):
        deepseek.resolve("mlp_hidden[-1:]")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("resid_post[3]", r"resid_post\[3\]: llama has layers 0\.\.2"),
        ("resid_post[-4]", r"resid_post\[-4\]: llama has layers 0\.\.2"),
        ("resid_post[5:9]", r"resid_post\[5:9\]: the slice is empty; llama has layers 0\.\.2"),
        ("z[1, head=4]", r"z\[1, head=4\]: head=4 is out of range; layer 1 has head 0\.\.3"),
        ("k[1, head=2]", r"layer 1 has head 0\.\.1"),
        ("mlp_hidden[1, neuron=40]", r"neuron=40 is out of range; layer 1 has neuron 0\.\.39"),
        ("resid_post[1, dim=-33]", r"dim=-33 is out of range; layer 1 has dim 0\.\.31"),
        ("embed[dim=32]", r"dim=32 is out of range; llama has dim 0\.\.31"),
        ("logits[token=101]", r"token=101 is out of range; llama has token 0\.\.100"),
        ("expert_out[1]", r"expert_out\[1\]: llama has no such site: layer 1 is dense: it has no experts"),
        ("expert_out[*]", r"expert_out\[\*\]: llama has no such site: layer 0 is dense"),
        ("g1[1]", r"g1\[1\]: llama has no such site: layer 1 has no factored experts"),
        ("z2[*]", r"z2\[\*\]: llama has no such site: layer 0 has no factored experts"),
    ],
)
def test_what_a_model_does_not_have_is_refused_with_the_reason(llama: Model, text: str, message: str) -> None:
    with pytest.raises(SiteError, match=message):
        llama.resolve(text)


def test_what_a_mixture_of_experts_does_not_have_is_refused_with_the_reason(deepseek: Model) -> None:
    with pytest.raises(SiteError, match=r"its neurons are expert_hidden\[1\]; layers that have it: \[0\]"):
        deepseek.resolve("mlp_hidden[1]")
    with pytest.raises(SiteError, match=r"expert=8 is out of range; layer 1 has expert 0\.\.7"):
        deepseek.resolve("expert_out[1, expert=8]")
    with pytest.raises(SiteError, match=r"slot=2 is out of range; layer 1 has slot 0\.\.1"):
        deepseek.resolve("expert_weight[1, slot=2]")


def test_a_parallel_family_says_that_it_has_no_middle() -> None:
    with pytest.raises(SiteError, match="attention and MLP are parallel in this family: both read resid_pre"):
        Model(tiny("gpt_neox"), name="neox").resolve("resid_mid[0]")


def test_the_map_lists_every_name_with_its_layers_or_the_reason(deepseek: Model) -> None:
    table = deepseek.map().set_index("site")
    assert list(table.index) == list(KINDS)
    assert table.loc["expert_out", "layers"] == [1, 2]
    assert not table.loc["shared_weight", "present"]
    assert "no gate" in table.loc["shared_weight", "absent"]
    assert bool(table[table.present].door.str.len().gt(0).all())
