"""From files to a checked model: a checkpoint directory, or one GGUF file.

transformers opens almost anything, and warns where it should stop: tensors that are missing are filled with
random numbers, a tokenizer that is not there is made up. Here each of these is an error before a researcher
measures noise.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch

from interp.quiet import quiet
from interp.zoo.errors import LoadError
from interp.zoo.hub import pickle_refusal

#: False refuses a checkpoint that brings its own Python; True runs it; "native" uses transformers' own class
#: instead.
RemoteCode = bool | Literal["native"]

_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt",
    "tekken.json", "tokenizer_config.json",
)  # fmt: skip


def open_directory(
    path: Path,
    *,
    dtype: torch.dtype | Literal["auto"],
    trust_remote_code: RemoteCode = False,
    allow_pickle: bool = False,
    **kw: Any,
) -> tuple[Any, Any]:
    """(model in eval mode, tokenizer or None) from a checkpoint directory with `config.json` and weights.

    Raises LoadError for an empty directory, a config without weights or the reverse, code or pickles that
    were not allowed, an unknown architecture, and tensors that are missing, misshapen or cut short.
    """
    from transformers import AutoModelForCausalLM

    refuse_remote_code(path, trust_remote_code)
    _refuse_without_weights(path, allow_pickle)
    if read_config(path).get("model_type") == "monet":
        import interp.monet  # noqa: F401 - makes the architecture known to transformers
    options = {
        "dtype": dtype,
        "trust_remote_code": trust_remote_code is True,
        "local_files_only": True,
        "use_safetensors": None if allow_pickle else True,
        **kw,
    }
    model = _checked(path, lambda: _whole(AutoModelForCausalLM, path, options))
    return model, open_tokenizer(path, trust_remote_code=trust_remote_code)


def open_gguf(file: Path, *, dtype: torch.dtype | Literal["auto"], **kw: Any) -> tuple[Any, Any]:
    """(model in eval mode, tokenizer) from a GGUF file; quantised blocks become plain `dtype` parameters.

    The result is an ordinary model whose numbers are the dequantised ones: close to, and not equal to, the
    original weights. Takes seconds per 100 MB. Raises LoadError for a file that is cut short, no GGUF, or of
    a family that transformers cannot read from GGUF.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with file.open("rb") as handle:
        magic = handle.read(4)
    if magic != b"GGUF":
        raise LoadError(f"{file}: not a GGUF file (it starts with {magic!r}, expected b'GGUF')")
    options = {
        "gguf_file": file.name,
        "dtype": dtype,
        "local_files_only": True,
        # without `dequantize` the model keeps a quantisation mark that save_pretrained refuses
        "quantization_config": GgufConfig(dequantize=True),
        **kw,
    }
    model = _checked(file, lambda: _whole(AutoModelForCausalLM, file.parent, options))
    tokenizer = _checked(
        file, lambda: AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    )
    return model, tokenizer


def open_tokenizer(path: Path, *, trust_remote_code: RemoteCode = False) -> Any:
    """The tokenizer beside a checkpoint, or None when it has none (token ids still work)."""
    from transformers import AutoTokenizer

    # asked for without files, transformers invents an empty tokenizer for some families
    if not any((path / name).is_file() for name in _TOKENIZER_FILES):
        return None
    trust = trust_remote_code is True
    return _checked(
        path,
        lambda: AutoTokenizer.from_pretrained(path, trust_remote_code=trust, local_files_only=True),
        "tokenizer",
    )


def refuse_remote_code(path: Path, trust_remote_code: RemoteCode) -> None:
    """Raise LoadError when a checkpoint names its own Python and nobody allowed it (nothing of it has run
    then)."""
    if trust_remote_code is not False:
        return
    for name in ("config.json", "tokenizer_config.json"):
        own = read_config(path, name).get("auto_map")
        if own:
            code = ", ".join(str(v) for v in own.values()) if isinstance(own, dict) else str(own)
            raise LoadError(
                f"{path}: its {name} names Python code of its own (auto_map: {code}). If you have read and "
                "trust it pass trust_remote_code=True; to use transformers' own class for the same "
                "model_type "
                'pass trust_remote_code="native"'
            )


def read_config(path: Path, name: str = "config.json") -> dict[str, Any]:
    """A JSON object beside the weights; empty when the file is not there, LoadError when it is no JSON
    object."""
    file = path / name
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LoadError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise LoadError(f"{file}: expected a JSON object, found {type(content).__name__}")
    return content


def _refuse_without_weights(path: Path, allow_pickle: bool) -> None:
    files = {f.name for f in path.iterdir() if f.is_file()}
    safe = any(f.endswith(".safetensors") and not f.startswith("adapter") for f in files)
    pickles = [f for f in files if f.endswith((".bin", ".pt", ".pth", ".ckpt")) and f != "training_args.bin"]
    if not files:
        raise LoadError(f"{path}: empty directory; expected config.json and *.safetensors")
    if "config.json" not in files:
        if "adapter_config.json" in files:
            raise LoadError(
                f"{path}: an adapter, not a model; merge it into its base model first (peft: merge_and_unload)"
            )
        if ggufs := sorted(f for f in files if f.endswith(".gguf")):
            raise LoadError(f"{path}: no config.json, but {ggufs[0]}: pass the file itself, {path / ggufs[0]}")
        raise LoadError(f"{path}: no config.json; expected a directory written by save_pretrained")
    if not safe and pickles and not allow_pickle:
        raise LoadError(pickle_refusal(str(path), pickles))
    if not safe and not pickles:
        raise LoadError(f"{path}: config.json but no weights; expected model.safetensors or its numbered shards")
    if not safe and not any(f.startswith("pytorch_model") and f.endswith(".bin") for f in files):
        raise LoadError(
            f"{path}: weights in {sorted(pickles)[0]}, which transformers does not look for; rename it to "
            "pytorch_model.bin if it is a state dict of this model"
        )


def _whole(cls: Any, path: Path, options: dict[str, Any]) -> Any:
    """from_pretrained, with every tensor of the model accounted for."""
    model, info = cls.from_pretrained(path, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    if misshapen := sorted(info["mismatched_keys"], key=str):
        key, found, expected = (*misshapen[0], "?", "?")[:3]
        raise LoadError(
            f"{path}: {len(misshapen)} tensors have another shape than config.json says, first {key}: "
            f"{tuple(found)} in the file, {tuple(expected)} expected. Weights and config are of "
            f"different models"
        )
    if missing := sorted(info["missing_keys"]):
        surplus = sorted(info["unexpected_keys"])
        hint = (
            f"; {len(surplus)} tensors in the file have names that the model lacks, first {surplus[0]}"
            if surplus
            else ""
        )
        raise LoadError(
            f"{path}: {len(missing)} tensors of {type(model).__name__} are not in the checkpoint, first "
            f"{missing[0]}{hint}. transformers would fill them with random numbers; get the whole checkpoint"
        )
    return model


def _checked(source: Path, opener: Any, what: str = "model") -> Any:
    """Run one of transformers' openers quietly, and turn what it raises into a LoadError that names the
    source."""
    try:
        with quiet():
            return opener()
    except LoadError:
        raise
    except Exception as error:  # it raises OSError, KeyError, ValueError, SafetensorError, UnpicklingError, ...
        first = next((line for line in str(error).splitlines() if line.strip()), "").strip()
        raise LoadError(f"{source}: the {what} cannot be opened ({type(error).__name__}: {first[:300]})") from error
