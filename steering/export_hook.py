"""A steering map as one Python file that needs torch and safetensors, and nothing of ours.

    steering.to_hook(m, v, "kind")        kind/steer.py, kind/steer.safetensors
    # elsewhere:
    from steer import attach
    with attach(model, strength=1.0): model.generate(...)

The file names the modules that are hooked and holds the vectors or matrices; it can be read in a minute. It follows the
scopes "all", "prompt", "generated" and "last | generated", with a KV cache and without.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from interp.sites import Site
from steering.errors import SteeringError
from steering.vector import SteeringMap

SCOPES = {"all": "all", "prompt": "prompt", "generated": "generated", "(last | generated)": "answer", "last": "last"}


def to_hook(m: Any, v: SteeringMap, out: str | os.PathLike[str]) -> Path:
    """Writes ``steer.py`` and ``steer.safetensors`` into the directory `out`; gives the former's path.

    Raises SteeringError for gates, for maps that are not affine, for sites that are no module's output, and for
    scopes that the file does not know.
    """
    from safetensors.torch import save_file

    v.as_edits(m)  # refuses another model's
    names = {id(module): name for name, module in m.hf.named_modules()}
    tensors: dict[str, torch.Tensor] = {}
    lines: list[str] = []
    for i, part in enumerate(v.parts):
        site = Site.parse(part.site)
        if part.gate is not None:
            raise SteeringError(
                f"{part.site}: a gate is code, which the file does not hold; take it off with .gated(None)"
            )
        if part.scope.text not in SCOPES:
            raise SteeringError(f"{part.site}: scope {part.scope.text!r}; the file knows {', '.join(SCOPES)}")
        place = m.anatomy.places.get((site.name, site.layer))
        module = m.anatomy.layers[site.layer] if site.name == "resid_post" else None if place is None else place.module
        if site.index or module is None or (site.name != "resid_post" and (place is None or place.how != "output")):
            raise SteeringError(
                f"{part.site}: it is no module's whole output; steer at resid_post, attn_out or mlp_out"
            )
        a, b = part.map.affine()
        for name, tensor in (("A", a), ("b", b)):
            if tensor is not None:
                tensors[f"{i}.{name}"] = tensor.float().cpu().contiguous().clone()
        lines.append(f"    ({names[id(module)]!r}, {SCOPES[part.scope.text]!r}, {i}),  # {part.site}")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    text = _FILE.replace("@ABOUT@", _plain(f"{v.method} on {m.name}")).replace("@PARTS@", "\n".join(lines))
    partial = folder / ".steer.partial"  # each file is whole or absent, and the code comes last
    save_file(tensors, partial, {"model": m.name, "fingerprint": v.fingerprint, "method": v.method})
    os.replace(partial, folder / "steer.safetensors")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, folder / "steer.py")
    return folder / "steer.py"


def _plain(text: str) -> str:
    """Text that cannot end the docstring that it stands in."""
    return " ".join(text.replace("\\", "/").replace('"', "'").split())


_FILE = '''"""Steering: @ABOUT@. Needs torch and safetensors only.

    from steer import attach
    with attach(model):                  # or attach(model, strength=2.0)
        model.generate(**tokenizer("...", return_tensors="pt"))

Which tokens: "all"; "prompt"; "generated" (behind the prompt); "last" (of the prompt); "answer" (last and
generated). A call of the model without a filled cache is a new sequence. When called directly, its whole input is
the prompt; in `generate` the prompt is what was given first.
"""

from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file

#: (module, which tokens, number of its tensors): h -> A h + b at the module's output
PARTS = [
@PARTS@
]


@contextmanager
def attach(model, strength=1.0, tensors=None):
    """Steers `model` inside the context: h -> h + strength * (A h + b - h)."""
    found = load_file(str(Path(__file__).with_name("steer.safetensors"))) if tensors is None else tensors
    modules = dict(model.named_modules())
    run = _Run()
    handles = [model.register_forward_pre_hook(run.begin, with_kwargs=True)]
    generate = model.generate

    def told(*args, **kwargs):
        ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        run.prompt = None if ids is None else ids.shape[1]
        try:
            return generate(*args, **kwargs)
        finally:
            run.prompt = None

    try:
        for name, scope, i in PARTS:
            hook = _hook(run, scope, found.get(f"{i}.A"), found.get(f"{i}.b"), strength)
            handles.append(modules[name].register_forward_hook(hook))
        model.generate = told
        yield model
    finally:
        for handle in handles:
            handle.remove()
        if model.__dict__.get("generate") is told:
            del model.generate


class _Run:
    """Where the running call stands: how many columns came before it, and where the prompt ends."""

    prompt = None

    def begin(self, module, args, kwargs):
        ids = kwargs.get("input_ids", args[0] if args else None)
        ids = kwargs["inputs_embeds"] if ids is None else ids
        mask, past = kwargs.get("attention_mask"), kwargs.get("past_key_values")
        before = past.get_seq_length() if past is not None else 0
        width = ids.shape[1]
        if before == 0:
            self.end = width if self.prompt is None else self.prompt
            self.mask = None if mask is None or mask.dim() != 2 else mask[:, : self.end].bool()
        self.columns = torch.arange(before, before + width, device=ids.device)
        full = mask is not None and mask.dim() == 2 and mask.shape[1] >= before + width
        self.real = mask[:, before : before + width].bool() if full else None

    def tokens(self, scope, batch):
        """True at the tokens to steer [batch, width]."""
        column, end = self.columns, self.end
        last = torch.full((batch, 1), end - 1, device=column.device)
        if self.mask is not None:  # the last real token, wherever the padding is
            last = (self.mask.shape[1] - 1 - self.mask.long().flip(1).argmax(1))[:, None]
        picked = {
            "all": (column >= 0).expand(batch, -1),
            "prompt": (column < end).expand(batch, -1),
            "generated": (column >= end).expand(batch, -1),
            "last": column == last,
            "answer": (column == last) | (column >= end),
        }[scope]
        return picked if self.real is None else picked & self.real


def _hook(run, scope, A, b, strength):
    def hook(module, args, output):
        h = output[0] if isinstance(output, tuple) else output
        new = h if A is None else h @ A.to(h).T
        new = new if b is None else new + b.to(h)
        out = torch.where(run.tokens(scope, len(h))[..., None], h + strength * (new - h), h)
        return (out, *output[1:]) if isinstance(output, tuple) else out

    return hook
'''
