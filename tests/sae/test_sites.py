"""A sparse autoencoder's latents and its error as sites: read, written, patched and attributed like any other."""

from __future__ import annotations

import pytest
import torch

import interp
from interp import edits, patching
from interp.metrics import Metric
from interp.sae import edits as direct
from interp.sae.autoencoder import SAE
from interp.sites import Pattern, Site, SiteError

AT = "resid_post[1]"


def autoencoder(site: str, width: int, seed: int = 0, d_sae: int = 24, **how: object) -> SAE:
    g = torch.Generator().manual_seed(seed)
    decoder = torch.nn.functional.normalize(torch.randn(d_sae, width, generator=g), dim=1)
    settings = {"arch": "topk", "k": 4, **how}
    return SAE(decoder=decoder, b_dec=torch.randn(width, generator=g) / 9, encoder=decoder, b_enc=torch.zeros(d_sae),
               sites=(site,), targets=(site,), **settings)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> interp.Model:
    return interp.load("tiny:llama")


@pytest.fixture
def m(model):
    yield model.attach(autoencoder(AT, model.d_model))
    model.detach()


@pytest.fixture(scope="module")
def ids(model) -> torch.Tensor:
    return torch.randint(4, model.d_vocab, (3, 9), generator=torch.Generator().manual_seed(1))


def margin(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, -1, 5] - logits[:, -1, 7]


@pytest.mark.parametrize("text", ["sae[resid_post[5], latent=9]", "sae_error[resid_post[5], dim=2]", "sae[embed]",
                                  "sae_error[z[0], head=3]", "sae[mlp_out[11]]"])  # fmt: skip
def test_the_grammar_reads_what_it_writes(text):
    site = Site.parse(text)
    assert str(site) == text
    assert Site.parse(str(site)) == site
    host = site.host
    assert host is not None
    assert host < site
    assert str(host) in text
    assert Pattern.parse("sae[blocks.5.hook_resid_post, latent=*]").name == "sae.resid_post"


@pytest.mark.parametrize(("text", "message"), [
    ("sae", "name the place"), ("sae[]", "name the place"), ("sae[5]", "'5' is not a site"),
    ("sae[z[0, head=1]]", "reads a whole site"), ("sae[expert_out[1]]", "reads a whole site"),
    ("sae[pattern[1]]", "reads a whole site"), ("sae[resid_post[1], head=2]", "takes latent="),
    ("sae_error[resid_post[1], latent=2]", "takes dim="), ("sae[resid_post[1]", "name the place"),
])  # fmt: skip
def test_texts_that_are_none(text, message):
    with pytest.raises(SiteError, match=message):
        Site.parse(text)


@pytest.mark.parametrize("site", ["embed", "resid_post[1]", "mlp_out[0]", "z[1]", "mlp_hidden[0]"])
@pytest.mark.parametrize("how", [{}, {"arch": "standard", "k": None}, {"normalize": "layer_norm"}])
def test_reading_gives_the_codes_and_changes_nothing(model, ids, site, how):
    plain = model.capture(ids, site, logits=True)
    s = autoencoder(site, plain[site][0, 0].numel(), **how)
    model.attach(s)
    try:
        acts = model.capture(ids, [site, f"sae[{site}]", f"sae_error[{site}]", f"sae[{site}, latent=-1]"], logits=True)
    finally:
        model.detach()
    assert torch.equal(acts.logits, plain.logits)
    h = plain[site]
    assert torch.equal(acts[f"sae[{site}]"], s.encode(h))
    assert torch.equal(acts[f"sae[{site}, latent=23]"], s.encode(h)[..., 23])
    assert torch.equal(acts[f"sae_error[{site}]"], h - s(h).reshape(h.shape))
    assert acts.axes(f"sae[{site}]") == ("batch", "pos", "latent")


def test_an_edit_is_the_one_that_the_autoencoder_makes_itself(m, ids):
    s = m.saes[Site.parse(AT)]
    codes = m.capture(ids, f"sae[{AT}]")[f"sae[{AT}]"]
    latent = int(codes[:, -1].amax(0).argmax())
    for ours, theirs in [
        (edits.zero(f"sae[{AT}, latent={latent}]", scope="last"), s.ablate(latent, scope="last")),
        (edits.add(f"sae[{AT}, latent={latent}]", 3.0), s.steer(latent, 3.0)),
        (edits.zero(f"sae_error[{AT}]"), direct.reconstruction(s)),
    ]:
        with m.intervene(ours):
            one = m.capture(ids, AT, logits=True)
        with m.intervene(theirs):
            two = m.capture(ids, AT, logits=True)
        torch.testing.assert_close(one.logits, two.logits, atol=2e-6, rtol=0)
        assert (one.logits - m(ids)).abs().max() > 1e-4
        if ours.scope.text == "last":
            assert torch.equal(one[AT][:, :-1], m.capture(ids, AT)[AT][:, :-1])  # other tokens, bit for bit


def test_edits_of_the_latents_the_error_and_the_place_compose_in_that_order(m, ids):
    """Host first, then error and latents, and readers see what went on."""
    s, v = m.saes[Site.parse(AT)], torch.randn(m.d_model, generator=torch.Generator().manual_seed(3))
    with m.intervene(edits.zero(f"sae[{AT}]"), edits.add(AT, v), edits.scale(f"sae_error[{AT}]", 0.5)):
        acts = m.capture(ids, [AT, f"sae[{AT}]", f"sae_error[{AT}]"])
    h = m.capture(ids, AT)[AT] + v
    error = s.error(h)
    assert not acts[f"sae[{AT}]"].any()
    torch.testing.assert_close(acts[f"sae_error[{AT}]"], error / 2)
    torch.testing.assert_close(acts[AT], s.b_dec + error / 2)


def test_gradients_are_those_of_the_parts_and_upstream_what_they_were(m, ids):
    s = m.saes[Site.parse(AT)]
    plain = m.capture(ids, [AT, "resid_post[0]"], logits=True, grad=True)
    slope, above = torch.autograd.grad(margin(plain.logits).sum(), [plain[AT], plain["resid_post[0]"]])
    sites = [f"sae[{AT}]", f"sae_error[{AT}]", "resid_post[0]"]
    acts = m.capture(ids, sites, logits=True, grad=True)
    assert torch.equal(acts.logits, plain.logits)
    z, e, up = torch.autograd.grad(margin(acts.logits).sum(), [acts[site] for site in sites])
    torch.testing.assert_close(z, slope @ s.decoder.T)
    torch.testing.assert_close(e, slope)
    torch.testing.assert_close(up, above, atol=1e-5, rtol=1e-4)
    linear, rest = direct.attribute(m, s, ids, margin)
    torch.testing.assert_close(z * acts[f"sae[{AT}]"].detach(), linear)
    torch.testing.assert_close((e * acts[f"sae_error[{AT}]"].detach()).sum(-1), rest)


def test_generation_is_the_same_with_and_without_a_cache(m, ids):
    with m.intervene(edits.add(f"sae[{AT}, latent=3]", 20.0, scope="generated")):
        texts = [m.generate(ids, max_new_tokens=5, use_cache=cache).tokens.ids for cache in (True, False)]
    assert torch.equal(*texts)
    assert not torch.equal(texts[0], m.generate(ids, max_new_tokens=5).tokens.ids)


def test_latents_and_the_error_are_nodes_of_patching(m, ids):
    """Exact patches equal the edit itself; the estimate is the gradient times the difference; all parts together are
    the whole activation."""
    clean, corrupt = ids[:1], ids[1:2]
    parts = [AT, f"sae[{AT}]", f"sae_error[{AT}]"]
    a, b = (m.capture(x, parts, logits=True, grad=x is corrupt) for x in (clean, corrupt))
    live = ((a[f"sae[{AT}]"][0, -1] != 0) | (b[f"sae[{AT}]"][0, -1] != 0)).nonzero().flatten().tolist()
    nodes = [f"sae[{AT}, latent={i}]@-1" for i in live] + [f"sae_error[{AT}]@-1"]
    metric = Metric(lambda logits, tokens: margin(logits), "margin")
    exact = patching.patch(m, clean, corrupt, metric, nodes).set_index("node")["value"]
    guess = patching.attribute(m, clean, corrupt, metric, nodes, method="atp").set_index("node")["value"]
    base = margin(b.logits).detach()
    gz, ge = torch.autograd.grad(margin(b.logits).sum(), [b[f"sae[{AT}]"], b[f"sae_error[{AT}]"]])
    for i in live:
        value = a[f"sae[{AT}]"][..., i]
        with m.intervene(edits.replace(f"sae[{AT}, latent={i}]", value, scope="last")):
            assert exact[f"sae[{AT}, latent={i}]"] == pytest.approx(float(margin(m(corrupt)) - base), abs=2e-5)
        step = (value - b[f"sae[{AT}]"][..., i]).detach()
        assert guess[f"sae[{AT}, latent={i}]"] == pytest.approx(float((gz[..., i] * step)[0, -1]), abs=2e-5)
    step = (a[f"sae_error[{AT}]"] - b[f"sae_error[{AT}]"]).detach()
    assert guess[f"sae_error[{AT}]"] == pytest.approx(float((ge * step)[0, -1].sum()), abs=2e-5)
    whole = patching.attribute(m, clean, corrupt, metric, f"{AT}@-1", method="atp")["value"].sum()
    assert float(guess.sum()) == pytest.approx(float(whole), abs=1e-4)


def test_what_does_not_fit_is_refused(model, ids):
    s = autoencoder(AT, model.d_model)
    with pytest.raises(SiteError, match=r"no sparse autoencoder is attached there; m.attach\(s\)"):
        model.capture(ids, f"sae[{AT}]")
    with pytest.raises(SiteError, match="no sparse autoencoder"):
        model.capture(ids, "sae[resid_post[*]]")
    with pytest.raises(SiteError, match=r"reads 7 numbers, and resid_post\[1\]"):
        model.attach(autoencoder(AT, 7))
    with pytest.raises(SiteError, match="a transcoder does not write what it reads"):
        model.attach(SAE(s.decoder, s.b_dec, s.encoder, s.b_enc, sites=("mlp_out[0]",), targets=(AT,)))
    with pytest.raises(SiteError, match="layers 0"):
        model.attach(autoencoder("resid_post[99]", model.d_model))
    model.attach(s)
    try:
        with pytest.raises(SiteError, match="has an autoencoder already"):
            model.attach(s)
        with pytest.raises(SiteError, match="latent=24 is out of range"):
            model.capture(ids, f"sae[{AT}, latent=24]")
        with pytest.raises(SiteError, match=r"layers that have it: \[1\]"):
            model.capture(ids, "sae[resid_post[0]]")
        assert [str(x) for x in model.resolve("sae[resid_post[*]]")] == [f"sae[{AT}]"]
        with model.intervene(edits.zero(f"sae[{AT}]")), pytest.raises(RuntimeError, match="a context is open"):
            model.detach()
    finally:
        model.detach(AT)
    assert not model.saes
