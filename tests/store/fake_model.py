"""A model without a network: activations that are a known function of the token ids.

Quick enough to start hundreds of writers, and exact: a test can say what each stored row must be. Everything that
`interp.store` uses of `interp.Model` is here.
"""

from __future__ import annotations

import hashlib
import re
import time
from typing import Any

import torch

from interp.activations import Activations, Tokens
from interp.sites import Site, SiteError

D_MODEL, N_HEADS, D_HEAD, N_EXPERTS, TOP_K, D_EXPERT, N_LAYERS, VOCAB = 6, 2, 3, 5, 2, 4, 3, 997


class FakeTokenizer:
    """One token per word, a BOS (id 1) before each text; the interface of a fast Hugging Face tokenizer."""

    is_fast = True
    all_special_ids = (1,)
    special_tokens_map = {"bos_token": "<bos>"}  # noqa: RUF012 -- as transformers has it

    def __init__(self, salt: str = "") -> None:
        self.salt = salt

    def get_vocab(self) -> dict[str, int]:
        return {"<bos>": 1, "salt" + self.salt: 2}

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[Any]]]:
        out: dict[str, list[list[Any]]] = {"input_ids": [], "special_tokens_mask": [], "offset_mapping": []}
        for text in texts:
            words = list(re.finditer(r"\S+", text))
            digests = [hashlib.sha256(w[0].encode()).digest() for w in words]
            ids = [2 + int.from_bytes(d[:4], "big") % (VOCAB - 2) for d in digests]
            out["input_ids"].append([1, *ids])
            out["special_tokens_mask"].append([1] + [0] * len(ids))
            out["offset_mapping"].append([(0, 0), *(w.span() for w in words)])
        return out


class FakeModel:
    """See the module. `pause` seconds pass in each batch; `poison` is a token id whose activations are NaN."""

    name = "fake"
    n_ctx = 64
    n_layers = N_LAYERS
    n_experts, top_k = N_EXPERTS, TOP_K
    device = torch.device("cpu")
    uses: tuple[Any, ...] = ()

    def __init__(self, seed: int = 0, *, dtype: torch.dtype = torch.float32, pause: float = 0.0,
                 poison: int | None = None, scale: float = 1.0, salt: str = "") -> None:
        self.tokenizer: Any = FakeTokenizer(salt)
        self.fingerprint = hashlib.sha256(f"{seed} {scale}".encode()).hexdigest()
        self.dtype, self.pause, self.poison, self.scale = dtype, pause, poison, scale
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.randn(VOCAB, 64, generator=generator)
        self.down = torch.randn(N_EXPERTS, D_MODEL, D_EXPERT, generator=generator)
        self.calls = 0

    def resolve(self, patterns: Any) -> list[Site]:
        out: list[Site] = []
        for text in [patterns] if isinstance(patterns, str | Site) else patterns:
            if isinstance(text, str) and "*" in text:
                out += [Site.parse(text.replace("*", str(layer))) for layer in range(N_LAYERS)]
            else:
                out.append(Site.parse(text))
        for site in out:
            if site.layer is not None and site.layer >= N_LAYERS:
                raise SiteError(f"{site}: fake has layers 0..{N_LAYERS - 1}")
        return list(dict.fromkeys(out))

    def capture(self, x: Tokens, sites: Any, *, check: bool = True) -> Activations:
        self.calls += 1
        if self.pause:
            time.sleep(self.pause)
        assert int(x.mask.sum(1).max()) <= self.n_ctx
        wanted = self.resolve(sites)
        wanted += [Site(n, s.layer) for s in wanted if s.kind.routed for n in ("expert_ids", "expert_weight")]
        tensors = {site: self.value(site, x.ids, x.position) for site in wanted}
        return Activations(x, tensors, model=self.name, n_experts=self.n_experts)

    def value(self, site: Site, ids: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """What is at a site, from ids and positions [batch, pos]."""
        layer = site.layer or 0
        base = self.table[ids] * self.scale + layer + 0.01 * position[..., None]  # [batch, pos, 64]
        if self.poison is not None:
            base = base.masked_fill((ids == self.poison)[..., None], float("nan"))
        base = base.to(self.dtype)
        if site.name in ("q", "k", "v", "z"):
            heads = base[..., : N_HEADS * D_HEAD].unflatten(-1, (N_HEADS, D_HEAD))
            return heads[..., dict(site.index)["head"], :] if site.index else heads
        if site.name == "expert_ids":
            first = (ids + layer) % N_EXPERTS
            return torch.stack([first, (first + 1 + ids % (N_EXPERTS - 1)) % N_EXPERTS], -1)
        if site.name == "expert_weight":
            return base[..., :TOP_K].softmax(-1)
        if site.name == "expert_hidden":
            return base[..., : TOP_K * D_EXPERT].unflatten(-1, (TOP_K, D_EXPERT))
        return base[..., :D_MODEL]

    def expert_output(self, layer: int, expert: int, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ self.down[expert].T.to(hidden.dtype)


def texts(n: int, words: int = 12) -> list[str]:
    """`n` documents of 1 to `words` words, each different."""
    return [" ".join(f"w{i}x{j}" for j in range(1 + (i * 7) % words)) for i in range(n)]
