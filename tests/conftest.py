"""Fixtures every test may use. Nothing here reaches for the network: what needs it skips with the reason."""

from __future__ import annotations

import os

# before anything imports huggingface_hub, which reads it once
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from interp import Model

ROOT = Path(__file__).resolve().parents[1]

if "PYTEST_XDIST_WORKER" in os.environ:
    # one thread per worker: more would only make the workers wait for each other
    torch.set_num_threads(1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file's tests stay on one worker, so that a real model is loaded once there; each notebook goes its own way."""
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False  # it would put files of few tests last, and those are the long ones

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return nodeid if "test_notebooks.py" in nodeid else super()._split_scope(nodeid)

    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long comes first, so that no worker is left with it in the end: notebooks, papers, the rest."""
    items.sort(key=lambda item: ("test_notebooks" not in item.nodeid, "/papers/" not in item.nodeid))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """The same random numbers in every test, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def smollm2() -> Model:
    """The real SmolLM2-135M-Instruct in float32; skips with the reason where it cannot be had."""
    import interp
    from interp.zoo.errors import LoadError

    try:
        return interp.load("smollm2")
    except LoadError as error:
        pytest.skip(f"SmolLM2 cannot be had here: {error}")


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """`shared("golden/x.json")`: a file of optional reference data; skips where that data is not there.

    Looked for in $INTERP_SHARED, then in `shared` beside the repository. No test of the project's own
    behaviour depends on it.
    """
    root = Path(os.environ.get("INTERP_SHARED") or ROOT.parent / "shared")

    def find(relative: str) -> Path:
        path = root / relative
        if not path.exists():
            pytest.skip(f"no reference data {relative} (set INTERP_SHARED to its directory)")
        return path

    return find
