"""Latents as places: what is edited changes the residual by the change of its latents and nothing else."""

from __future__ import annotations

import pytest
import torch

import interp
from interp import edits, sae
from interp.sae import edits as sae_edits
from tests.sae.test_files import made

IDS = torch.randint(0, 100, (3, 10), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def m() -> interp.Model:
    return interp.load("tiny:llama")


@pytest.fixture(scope="module")
def s(m: interp.Model) -> sae.SAE:
    x = m.capture(IDS, "resid_post[1]")["resid_post[1]"].flatten(0, 1)
    return sae.train(x, "resid_post[1]", arch="topk", d_sae=24, k=4, tokens=600, batch_size=30, progress=False, lr=1e-2)


def test_ablating_removes_the_latents_part_and_keeps_the_error(m: interp.Model, s: sae.SAE) -> None:
    z, error, acts = sae_edits.capture(m, s, IDS)
    h = acts["resid_post[1]"]
    assert torch.allclose(s.decode(z) + error, h, atol=1e-5)
    busiest = int((z > 0).sum((0, 1)).argmax())
    with m.intervene(s.ablate(busiest)) as handle:
        after = m.capture(IDS, "resid_post[1]")["resid_post[1]"]
        logits = m(IDS)
    expected = h - z[..., busiest, None] * s.decoder[busiest]
    assert torch.allclose(after, expected, atol=1e-5)
    assert len(handle.trace()) == IDS.numel()
    with m.intervene(edits.replace("resid_post[1]", expected)):
        assert torch.allclose(m(IDS), logits, atol=1e-4)
    silent = z[..., busiest] == 0
    assert torch.allclose(after[silent], h[silent])
    assert not torch.allclose(after, h)


def test_patching_latents_from_another_run(m: interp.Model, s: sae.SAE) -> None:
    other = IDS.flip(1)
    z, error, _ = sae_edits.capture(m, s, IDS)
    donor, _, _ = sae_edits.capture(m, s, other)
    some = [0, 3, 7, 11]
    with m.intervene(s.clamp(some, donor[..., some])):
        after = m.capture(IDS, "resid_post[1]")["resid_post[1]"]
    mixed = z.clone()
    mixed[..., some] = donor[..., some]
    assert torch.allclose(after, s.decode(mixed) + error, atol=1e-5)


def test_steering_adds_the_direction_where_asked(m: interp.Model, s: sae.SAE) -> None:
    h = m.capture(IDS, "resid_post[1]")["resid_post[1]"]
    with m.intervene(s.steer(5, 3.0, scope=(torch.arange(10) == 4).expand(3, -1))):
        after = m.capture(IDS, "resid_post[1]")["resid_post[1]"]
    expected = h.clone()
    expected[:, 4] += 3 * s.decoder[5]
    assert torch.allclose(after, expected, atol=1e-5)


def test_reconstruction_with_all_of_its_error_changes_nothing(m: interp.Model, s: sae.SAE) -> None:
    plain = m(IDS)
    with m.intervene(sae_edits.reconstruction(s, error=1.0)):
        assert torch.allclose(m(IDS), plain, atol=1e-4)
    with m.intervene(sae_edits.reconstruction(s)):
        assert not torch.allclose(m(IDS), plain, atol=1e-3)


def test_attribution_is_exact_where_the_metric_is_linear(m: interp.Model, s: sae.SAE) -> None:
    """At the last layer, behind a norm: small steps along a latent move the metric by the gradient's estimate."""

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return logits[:, -1, 5] - logits[:, -1, 6]

    z, _, _ = sae_edits.capture(m, s, IDS)
    effect, rest = sae_edits.attribute(m, s, IDS, metric)
    assert effect.shape == z.shape
    assert rest.shape == IDS.shape
    base = metric(m(IDS))
    latent = int(effect.abs().sum((0, 1)).argmax())
    step = 1e-2
    with m.intervene(s.clamp(latent, z[..., [latent]] * (1 + step))):
        moved = metric(m(IDS))
    assert torch.allclose((moved - base) / step, effect[..., latent].sum(1), rtol=0.1, atol=1e-3)


def test_latents_that_are_not_there_are_refused(m: interp.Model, s: sae.SAE) -> None:
    with pytest.raises(sae.SAEError, match=r"latents=\[24\]: expected numbers in 0\.\.23"):
        s.ablate(24)
    with pytest.raises(sae.SAEError, match="latent=-1"):
        s.latent(-1)
    assert s.latent(9) == "sae[resid_post[1], latent=9]"
    with pytest.raises(sae.SAEError, match="does not write where it reads"):
        made("standard", targets=("mlp_out[1]",)).ablate(0)
    wide = made("standard", sites=("resid_post[1]",))
    with pytest.raises(sae.SAEError, match=r"takes d_in=16 at resid_post\[1\]"), m.intervene(wide.ablate(0)):
        m(IDS)
