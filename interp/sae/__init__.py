"""Sparse autoencoders: from activations to directions that fire rarely, and what they are good for.

    from interp import sae
    s = sae.train(ds, site="resid_post[15]", arch="batchtopk", d_sae=4608, k=32)
    sae.evaluate(s, m, texts)                       what it costs, what it explains, with intervals
    with m.intervene(s.ablate(9)): m(toks)          a latent off; what no latent explains stays
    s.save("dir"); sae.load("dir")                  SAELens reads the same directory
    sae.load("sae-smollm2")                         one that comes with the project (`sae.names()`)

From the bottom: `kernels` (sparse codes, forward and backward), `select` and `pursuit` (which latents fire), `settings`
and `architectures` (each paper's loss on one path), `sources`, `trainer`, `checkpoint` and `train`; `autoencoder` (what
comes out), `files` (on disk), `edits` (as interventions); `evaluate`, `probing`, `absorption`, `isolation`, `dark` and
`versus` (what it is worth, beside experts), `interpretability` and `resection` (the same in words, and by taking
features out); `per_expert` (one for every expert); `latents`, `page`, `explain` and `find` (what a latent is about);
`behaviour` (what it can steer); `shards` (latents over several processes).
"""

from __future__ import annotations

from interp.bridges.sae_lens import SAEError
from interp.sae.absorption import absorption, first_letters
from interp.sae.autoencoder import ARCHITECTURES, SAE
from interp.sae.dark import dark_matter
from interp.sae.evaluate import evaluate, pareto
from interp.sae.files import from_sae_lens, load, names, pretrained, save
from interp.sae.isolation import isolation
from interp.sae.settings import DEFAULTS, Settings
from interp.sae.train import train, train_many

__all__ = [
    "ARCHITECTURES", "DEFAULTS", "SAE", "SAEError", "Settings", "absorption", "dark_matter", "evaluate",
    "first_letters", "from_sae_lens", "isolation", "load", "names", "pareto", "pretrained", "save",
    "train", "train_many",
]  # fmt: skip
