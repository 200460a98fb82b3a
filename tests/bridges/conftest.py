"""Fixtures of the bridges: a small tokenizer, and a second line of TransformerLens beside the installed one."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from filelock import FileLock

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SECOND_LINE = "4.3.0"


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"bridges_{name}", HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def lens_checks() -> ModuleType:
    """The checks of the TransformerLens bridge, as functions."""
    pytest.importorskip("transformer_lens")
    return _load("lens_checks")


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return _load("lens_checks").small_tokenizer()


@pytest.fixture(scope="session")
def second_line() -> Path:
    """A directory with transformer-lens 4.3, installed once; skips with the reason where it cannot be had.

    It lives in $INTERP_CACHE if that is set, else in `.cache` of the repository. It is installed without its
    dependencies: the environment has them for the line that is installed in it.
    """
    pytest.importorskip("transformer_lens")
    cache = Path(os.environ.get("INTERP_CACHE") or ROOT / ".cache")
    target = cache / f"transformer-lens-{SECOND_LINE}"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f".{target.name}.lock"):
        if not (target / "transformer_lens").is_dir():
            private = tempfile.mkdtemp(prefix=f".{target.name}.", dir=cache)
            command = [
                sys.executable,
                "-m",
                "pip",
                "install",
                "--quiet",
                "--no-deps",
                "--no-input",
                "--retries",
                "1",
                "--disable-pip-version-check",
                "--target",
                private,
                f"transformer-lens=={SECOND_LINE}",
            ]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
                reason = done.stderr.strip().splitlines()[-1:] if done.returncode else []
            except subprocess.TimeoutExpired:
                reason = ["pip did not finish within 180 s"]
            if reason or not (Path(private) / "transformer_lens").is_dir():
                shutil.rmtree(private, ignore_errors=True)
                pytest.skip(f"transformer-lens {SECOND_LINE} cannot be installed: {' '.join(reason)}")
            shutil.rmtree(target, ignore_errors=True)
            Path(private).rename(target)
    return target


@pytest.fixture(scope="session")
def second_line_outcomes(second_line: Path) -> dict[str, str]:
    """Every check run on the second line, in one process of its own: name -> "passed", "skipped: ..." or a traceback.

    Under "line" stands the version that they ran on.
    """
    path = os.pathsep.join([str(second_line), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(HERE / "lens_checks.py")],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


@pytest.fixture
def on_second_line(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """`on_second_line(name)`: passes, skips or fails as that check did there."""
    outcomes = request.getfixturevalue("second_line_outcomes")

    def report(name: str) -> None:
        outcome = outcomes[name]
        if outcome.startswith("skipped: "):
            pytest.skip(outcome.removeprefix("skipped: "))
        assert outcome == "passed", outcome

    return report
