"""The fake model, for every test of the store."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from interp import store


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fake_model", Path(__file__).with_name("fake_model.py"))
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["fake_model"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def fake() -> ModuleType:
    """The module `fake_model`: FakeModel, texts, sizes."""
    return _load()


@pytest.fixture
def write(fake: ModuleType, tmp_path: Path) -> Any:
    """``write(texts, sites, dir="a", model=..., **options)`` with small settings and no bar."""

    def run(texts: Any = None, sites: Any = ("resid_post[1]",), dir: str = "ds", *, model: Any = None, **options: Any):
        settings = {"context": 8, "batch_size": 3, "shard_tokens": 64, "progress": False, **options}
        return store.write(model or fake.FakeModel(), fake.texts(40) if texts is None else texts, list(sites),
                           tmp_path / dir, **settings)

    return run
