"""`interp.load`: one door for every kind of source.

A source is recognised in this order: an object that is already a model; a zoo name; `tiny:<family>`; a path
(a directory or a .gguf file); a hub id. Each ends as a checked Hugging Face model with its tokenizer, if it
has one.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from interp.zoo import cache, hub
from interp.zoo.checkpoint import RemoteCode, open_directory, open_gguf, open_tokenizer, refuse_remote_code
from interp.zoo.errors import LoadError

if TYPE_CHECKING:
    from interp.model import Model

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
_DTYPES |= {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Loaded(NamedTuple):
    """What a source turned out to be: the Hugging Face model, its tokenizer or None, a short name, where it
    came from."""

    hf: Any
    tokenizer: Any
    name: str
    card: dict[str, Any]


def _smollm2() -> Path:
    from interp.zoo import smollm2

    return smollm2.directory()


#: Zoo names that are made on first use: name -> a function that returns the checkpoint's directory.
MADE: dict[str, Callable[[], Path]] = {"smollm2": _smollm2}


def trained_dir() -> Path:
    """Where checkpoints that come with the project live, one directory per zoo name."""
    return Path(__file__).parents[2] / "data" / "models"


def names() -> list[str]:
    """All zoo names: those made on first use and those that come with the project, sorted."""
    trained = trained_dir()
    return sorted({p.parent.name for p in trained.glob("*/config.json")} | set(MADE))


def load(
    source: Any,
    tokenizer: Any = None,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    trust_remote_code: RemoteCode = False,
    allow_pickle: bool = False,
    revision: str | None = None,
    **kw: Any,
) -> Model:
    """Open a causal language model from anywhere, ready to capture and intervene.

        m = interp.load("smollm2")                            # a real 135M model; fetched once
        m = interp.load("allenai/OLMoE-1B-7B-0924", dtype="bfloat16", device="cuda")
        m = interp.load("tiny:olmoe")                         # a random toy of that architecture
        m = interp.load(hf_model, tokenizer=tok)              # a model you already hold

    Args:
        source: a zoo name (`interp.zoo.load.names()`), `tiny:<family>`, a hub id `owner/name`, a directory, a
            `.gguf` file, a loaded PreTrainedModel, a TransformerLens TransformerBridge, or a Model (returned
            as it is).
        tokenizer: a tokenizer, or a directory or hub id to take one from; default: the one beside the
            weights. It may be missing: then texts are refused and token ids still work.
        dtype: "float32", "bfloat16", "float16", a torch.dtype, or "auto" for the checkpoint's own. The
            default is float32, for exactness, on every device; a model that is already loaded keeps its own.
        device: where to put it, such as "cuda" or "mps". The default is the processor; a loaded model
            stays where it is.
        trust_remote_code: a checkpoint that names its own Python is refused (False), run (True), or opened
            with transformers' own class of the same model_type ("native").
        allow_pickle: weights that exist only as a pickle are refused unless this is True.
        revision: the hub commit, branch or tag.
        **kw: handed to transformers' `from_pretrained`; for `tiny:<family>` fields of its config.

    Raises:
        LoadError (a ValueError): the source does not exist, is incomplete, damaged, not allowed, or no causal
        LM.
    """
    from interp.quiet import import_tqdm

    import_tqdm()
    from interp.model import Model

    if isinstance(source, Model):
        if tokenizer is not None or dtype is not None or device is not None:
            raise LoadError(
                "load: source is already an interp.Model; pass source.hf to change its tokenizer, dtype, device"
            )
        return source
    if _is_bridge(source):
        from interp.bridges.transformer_lens import from_bridge

        if dtype is not None or device is not None:
            raise LoadError("load: source is a TransformerBridge; boot it with the dtype and device you want")
        return from_bridge(source, tokenizer)
    loaded = resolve(
        source,
        tokenizer,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
        revision=revision,
        **kw,
    )
    model = Model(loaded.hf, loaded.tokenizer, name=loaded.name)
    model.card = loaded.card
    return model


def resolve(
    source: Any,
    tokenizer: Any = None,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    trust_remote_code: RemoteCode = False,
    allow_pickle: bool = False,
    revision: str | None = None,
    **kw: Any,
) -> Loaded:
    """What `load` does short of wrapping: the Hugging Face model, tokenizer, name and card of a source.

    Arguments and errors are those of `load`. The card says `source` (zoo, tiny, directory, gguf, hub,
    object), `dtype` and what else is known of the weights' origin.
    """
    if trust_remote_code not in (False, True, "native"):
        raise LoadError(f'trust_remote_code={trust_remote_code!r}: expected False, True or "native"')
    if _is_hf_model(source):
        found = Loaded(source, None, _object_name(source), {"source": "object"})
        if kw or revision:
            raise LoadError(f"load: {', '.join(kw) or 'revision'} has no meaning for a model that is already loaded")
        if dtype is not None and dtype != "auto":
            source.to(_dtype(dtype))
    elif isinstance(source, str | os.PathLike):
        options = {
            "dtype": _dtype("float32" if dtype is None else dtype),
            "trust_remote_code": trust_remote_code,
        }
        found = _from_text(os.fspath(source), revision, options | {"allow_pickle": allow_pickle} | kw)
    else:
        raise LoadError(
            f"load: a {type(source).__module__}.{type(source).__qualname__} is no source; expected a name, "
            "a path, a hub id, a transformers PreTrainedModel or a TransformerLens TransformerBridge"
        )
    if device is not None:
        found.hf.to(_device(device))
    card = {**found.card, "dtype": str(found.hf.dtype).removeprefix("torch.")}
    return found._replace(tokenizer=_tokenizer(tokenizer, found.tokenizer, trust_remote_code), card=card)


def _from_text(source: str, revision: str | None, options: dict[str, Any]) -> Loaded:
    """A source given as text: zoo name, tiny:<family>, path, or hub id, in this order."""
    if source.startswith("tiny:"):
        return _from_tiny(source, options)
    if source in names():
        path = MADE[source]() if source in MADE else trained_dir() / source
        return Loaded(*open_directory(path, **options), source, {"source": "zoo", **_origin(path)})
    path = Path(source).expanduser()
    if path.is_file():
        return _from_file(path, options)
    if path.is_dir():
        return Loaded(*open_directory(path, **options), path.resolve().name, {"source": "directory", **_origin(path)})
    if source.endswith(".gguf") or source.startswith((".", "~", os.sep)) or source.count("/") > 1 or "\\" in source:
        raise LoadError(f"{source}: no such file or directory (looked from {Path.cwd()})")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source):
        raise LoadError(f"{source!r}: no zoo name, no path and no hub id; zoo names are {', '.join(names())}")
    return _from_hub(source, revision, options)


def _from_tiny(source: str, options: dict[str, Any]) -> Loaded:
    from interp.zoo.tiny import tiny

    family = source.removeprefix("tiny:")
    overrides = {k: v for k, v in options.items() if k not in ("dtype", "trust_remote_code", "allow_pickle")}
    try:
        model: Any = tiny(family, **overrides)
    except (ValueError, KeyError) as error:
        raise LoadError(f"{source}: {error.args[0] if error.args else error}") from error
    if options["dtype"] != "auto":
        model = model.to(options["dtype"])
    return Loaded(model, None, source, {"source": "tiny", "weights": "random"})


def _from_file(file: Path, options: dict[str, Any]) -> Loaded:
    if file.suffix == ".gguf":
        kw = {k: v for k, v in options.items() if k not in ("trust_remote_code", "allow_pickle")}
        return Loaded(*open_gguf(file, **kw), file.stem, {"source": "gguf", "weights": f"dequantised from {file.name}"})
    raise LoadError(f"{file}: expected a .gguf file or the directory that holds config.json and the weights")


def _from_hub(repo: str, revision: str | None, options: dict[str, Any]) -> Loaded:
    trust = options["trust_remote_code"]
    try:
        path = hub.fetch(
            repo,
            lambda small: refuse_remote_code(small, trust),
            revision=revision,
            allow_pickle=options["allow_pickle"],
            trust_remote_code=trust is True,
        )
    except LoadError as error:
        # a bare word was most likely meant as a zoo name: say what there is before what the hub said
        if "/" in repo:
            raise
        near = difflib.get_close_matches(repo, names(), n=3, cutoff=0.5)
        meant = f"did you mean {' or '.join(near)}?" if near else f"zoo names are {', '.join(names())}."
        raise LoadError(f"{repo!r}: no zoo name, {meant} No such directory either, and as a hub id: {error}") from error
    card = {"source": "hub", "repo": repo, "revision": revision or path.name}
    return Loaded(*open_directory(path, **options), repo, card)


def _tokenizer(asked: Any, found: Any, trust_remote_code: RemoteCode) -> Any:
    """The tokenizer to use: the one given, the one at a given place, else the one beside the weights."""
    if asked is None:
        return found
    if not isinstance(asked, str | os.PathLike):
        return asked
    path = Path(asked).expanduser()
    if os.fspath(asked) in MADE:
        path = MADE[os.fspath(asked)]()
    if not path.is_dir():
        path = hub.fetch_tokenizer(os.fspath(asked))
    refuse_remote_code(path, trust_remote_code)
    tokenizer = open_tokenizer(path, trust_remote_code=trust_remote_code)
    if tokenizer is None:
        raise LoadError(f"tokenizer={str(asked)!r}: no tokenizer files in {path}")
    return tokenizer


def _origin(path: Path) -> dict[str, Any]:
    """What the entry's own card says of its weights; `origin` is that card's word for where they came
    from."""
    card = cache.read_card(path)
    kept = {key: card[key] for key in ("weights", "upstream", "package", "license") if key in card}
    return kept | ({"origin": card["source"]} if "source" in card else {}) | {"path": str(path)}


def _dtype(dtype: torch.dtype | str) -> torch.dtype | Literal["auto"]:
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        return dtype
    if dtype == "auto":
        return "auto"
    if isinstance(dtype, str) and dtype.removeprefix("torch.") in _DTYPES:
        return _DTYPES[dtype.removeprefix("torch.")]
    raise LoadError(f"dtype={dtype!r}: expected auto, a floating torch.dtype, or one of {', '.join(_DTYPES)}")


def _device(device: torch.device | str) -> torch.device:
    try:
        wanted = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise LoadError(f"device={device!r}: {str(error).splitlines()[0]}") from error
    if wanted.type == "cuda" and not torch.cuda.is_available():
        raise LoadError(f"device={device!r}: this torch ({torch.__version__}) sees no CUDA device; use device='cpu'")
    if wanted.type == "mps" and not torch.backends.mps.is_available():
        raise LoadError(f"device={device!r}: no MPS device here; use device='cpu'")
    return wanted


def _is_hf_model(source: Any) -> bool:
    from transformers import PreTrainedModel

    return isinstance(source, PreTrainedModel)


def _is_bridge(source: Any) -> bool:
    """Is it a TransformerLens bridge? Told by class name, because importing transformer_lens takes
    seconds."""
    family = {(cls.__module__.partition(".")[0], cls.__name__) for cls in type(source).__mro__}
    if ("transformer_lens", "HookedTransformer") in family:
        raise LoadError(
            "load: a HookedTransformer has TransformerLens's own rewritten weights; pass a "
            "TransformerBridge, or "
            "the transformers model it was made from"
        )
    return ("transformer_lens", "TransformerBridge") in family


def _object_name(model: Any) -> str:
    """A short name for a loaded model: the last part of where it says it came from, else its family."""
    path = str(getattr(model.config, "name_or_path", "") or "")
    return Path(path).name if path else str(model.config.model_type)
