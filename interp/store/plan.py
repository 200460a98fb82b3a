"""What a dataset is of: the settings that every run and every worker on it must share.

The plan is written once, before the first activation, and never changes. Every later run compares its own plan with it
and is refused, with the differences named, if a row of it could come out otherwise.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from interp.sites import Site
from interp.store.disk import dump_json, write_atomic
from interp.store.errors import Mismatch, NotADataset, StoreError
from interp.version import __version__

FORMAT = "interp-activations"
VERSION = 1
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# These say where and when the dataset was begun, not what is in it.
_ABOUT = ("created", "versions", "card", "model_name", "content_sha256")


@dataclass(frozen=True)
class Plan:
    """The settings of a dataset; see `store.write` for what each means."""

    model: str
    model_dtype: str
    tokenizer: str | None
    n_experts: int
    sites: tuple[Site, ...]
    dtype: str
    context: int
    batch_size: int
    shard_tokens: int
    documents_per_range: int
    seed: int
    empty: str
    documents: int | None
    edits: tuple[str, ...] = ()
    model_name: str = ""
    created: str = ""
    card: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def as_json(self) -> dict[str, Any]:
        data = {"format": FORMAT, "format_version": VERSION, **self.__dict__}
        return {**data, "sites": [str(site) for site in self.sites], "edits": list(self.edits)}

    @property
    def content(self) -> dict[str, Any]:
        """The part that decides what is in the dataset."""
        return {k: v for k, v in self.as_json().items() if k not in _ABOUT}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Plan:
        known = {k: v for k, v in data.items() if k in cls.__dataclass_fields__}
        return cls(**{**known, "sites": tuple(Site.parse(s) for s in data["sites"]),
                      "edits": tuple(data["edits"])})


def make_plan(model: Any, sites: str | Site | Sequence[str | Site], documents: int | None, *, dtype: Any, context: int,
              batch_size: int, shard_tokens: int | None, documents_per_range: int | None, seed: int, empty: str,
              card: dict[str, Any]) -> Plan:
    """Check the arguments of `store.write` against the model and bring them into one form."""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise StoreError(f"dtype={dtype!r}: a dataset keeps {', '.join(DTYPES)}")
    numbers = {"context": context, "batch_size": batch_size, "shard_tokens": shard_tokens,
               "documents_per_range": documents_per_range}
    for argument, value in numbers.items():
        if value is None and argument not in ("context", "batch_size"):
            continue  # chosen below
        if not isinstance(value, int) or value < 1:
            raise StoreError(f"{argument}={value!r}: expected a whole number of at least 1")
    if model.n_ctx and context > model.n_ctx:
        raise StoreError(f"context={context}: {model.name} takes at most {model.n_ctx} tokens at once")
    resolved = model.resolve([sites] if isinstance(sites, str | Site) else list(sites))
    if not resolved:
        raise StoreError(f"sites={sites!r}: no site was asked for")
    for site in resolved:
        _check_storable(site)
    if shard_tokens is None:
        shard_tokens = 1 << (15 if any(site.name == "expert_hidden" for site in resolved) else 17)
    return Plan(
        model=model.fingerprint, model_dtype=str(model.dtype).removeprefix("torch."),
        tokenizer=tokenizer_fingerprint(model.tokenizer), n_experts=int(model.n_experts),
        sites=tuple(dict.fromkeys(resolved)), dtype=name, context=context, batch_size=batch_size,
        shard_tokens=shard_tokens, documents_per_range=documents_per_range or max(1, shard_tokens // context),
        seed=seed, empty=empty, documents=documents, model_name=model.name,
        # Under an open `intervene` context the activations are those of the edited model, which is another dataset.
        edits=tuple(_describe(bound) for use in model.uses for bound in use.edits), card=card, versions=_versions(),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def _describe(bound: Any) -> str:
    """An edit in force at a site as one line: its name, scope and settings, tensors by their hash."""
    settings = []
    for key, value in vars(bound.edit.map).items():
        if isinstance(value, torch.Tensor):
            value = hashlib.sha256(value.detach().cpu().float().numpy().tobytes()).hexdigest()[:12]
        if isinstance(value, str | int | float):
            settings.append(f"{key}={value}")
    gate = ", gated" if bound.edit.gate else ""
    return f"{bound.edit.name}({', '.join(settings)}) at {bound.site}, scope {bound.edit.scope.text!r}{gate}"


def _check_storable(site: Site) -> None:
    if site.name == "expert_out":
        raise StoreError(f"{site}: outputs of experts are not stored, they are recomputed; store "
                         f"expert_hidden[{site.layer}] and read ds.expert({site.layer}, e).out(model)")
    if site.name == "pattern":
        raise StoreError(f"{site}: a pattern is as wide as its text is long, so it has no rows of one size; store "
                         f"q[{site.layer}] and k[{site.layer}], or take it from model.capture")
    index = dict(site.index)
    if "expert" in index or (site.name == "expert_hidden" and index):
        raise StoreError(f"{site}: routed sites are stored whole; store {site.base} and read "
                         f"ds.expert({site.layer}, {index.get('expert', 'e')})")


def begin(root: Path, plan: Plan, scratch: Path) -> Plan:
    """Write the plan into a new dataset, or check it against the one that is there; gives the one on disk."""
    if not write_atomic(root / "plan.json", dump_json(plan.as_json(), indent=1), exclusive=True, scratch=scratch):
        there = read_plan(root)
        changed = differences(there, plan)
        if changed:
            raise Mismatch(f"dir={str(root)!r} holds a dataset made with other settings: {'; '.join(changed)}. "
                           "Ask for the same settings to resume it, or write to a new directory")
        return there
    return plan


def differences(there: Plan, asked: Plan) -> list[str]:
    """What differs between two plans, in words."""
    words = {"model": "model (fingerprint of weights and config)", "tokenizer": "tokenizer (fingerprint)",
             "model_dtype": "dtype of the model", "documents": "number of documents"}
    old, new = there.content, asked.content
    out = []
    for key in old:
        unknown_length = key == "documents" and None in (old[key], new[key])  # of a stream; compared at its end
        if old[key] != new[key] and not unknown_length:
            a, b = (", ".join(x) if isinstance(x, list) else x for x in (old[key], new[key]))
            out.append(f"{words.get(key, key)}: the dataset has {a}, asked for is {b}")
    return out


def read_plan(root: Path) -> Plan:
    """The plan of a dataset. Raises NotADataset with the reason where there is none."""
    path = root / "plan.json"
    if not root.exists():
        raise NotADataset(f"dir={str(root)!r}: there is no such directory; store.write makes a dataset")
    if not path.is_file():
        raise NotADataset(f"dir={str(root)!r} is not an activation dataset: it has no plan.json")
    try:
        data = json.loads(path.read_bytes())
        if data["format"] != FORMAT:
            raise NotADataset(f"dir={str(root)!r}: plan.json is of {data['format']!r}, not {FORMAT!r}")
        if data["format_version"] > VERSION:
            raise NotADataset(f"dir={str(root)!r}: format version {data['format_version']} is newer than this interp "
                              f"{__version__} reads ({VERSION}); update interp")
        return Plan.from_json(data)
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, StoreError):
            raise
        raise NotADataset(f"dir={str(root)!r} is not an activation dataset: plan.json is not readable ({error})"
                          ) from error


def tokenizer_fingerprint(tokenizer: Any) -> str | None:
    """Hash of what decides a tokenizer's ids: vocabulary, merges, normalisation, special tokens. None for None."""
    if tokenizer is None:
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # Before its first rule the text says how the last call truncated and padded, which is not the tokenizer's own.
        text = backend.to_str()
        rules = text[max(0, text.find('"added_tokens"')) :]
    else:
        rules = type(tokenizer).__name__ + json.dumps(tokenizer.get_vocab(), sort_keys=True)
    special = {k: str(v) for k, v in getattr(tokenizer, "special_tokens_map", {}).items()}
    text = rules + json.dumps(special, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


@cache  # finding a package's version takes milliseconds
def _versions() -> dict[str, str]:
    out = {"interp": __version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "pyarrow"):
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            continue
    return out
