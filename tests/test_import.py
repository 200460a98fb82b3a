"""Importing is quick and has no side effects: what is heavy waits until it is used."""

from __future__ import annotations

import importlib
import importlib.util
import json
import pkgutil
import subprocess
import sys

import pytest

import interp

HEAVY = (
    "transformer_lens", "sae_lens", "nnsight", "datasets", "mlcroissant", "plotly", "pandas", "pyarrow", "sklearn",
    "scipy",
)  # fmt: skip
# modules that are imported only where such a package is
WITH = {"interp.sae.triton_kernels": "triton"}
MODULES = sorted(
    m.name
    for m in pkgutil.walk_packages(interp.__path__, "interp.")
    if m.name not in WITH or importlib.util.find_spec(WITH[m.name])
)


def in_fresh_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_interp_loads_neither_torch_nor_transformers():
    loaded = in_fresh_python("import interp, sys; print([m for m in ('torch', 'transformers') if m in sys.modules])")
    assert loaded.strip() == "[]"


def test_command_line_loads_no_torch_before_a_command_runs():
    loaded = in_fresh_python("import interp.cli, sys; print('torch' in sys.modules)")
    assert loaded.strip() == "False"


def test_no_module_imports_a_heavy_package():
    """Which heavy package appears with which of our modules, imported one after the other."""
    code = (
        "import importlib, json, sys, torch, transformers\n"
        f"found, heavy = {{}}, {HEAVY}\n"
        f"for name in {MODULES}:\n"
        "    before = set(sys.modules)\n"
        "    importlib.import_module(name)\n"
        "    if new := [h for h in heavy if h in sys.modules and h not in before]:\n"
        "        found[name] = new\n"
        "print(json.dumps(found))\n"
    )
    found = json.loads(in_fresh_python(code))
    found.pop("interp.monet", [])  # made of transformers' Llama parts, which load scipy for their losses
    assert found == {}


def test_monet_loads_no_more_than_the_llama_it_is_made_of():
    code = (
        "import json, sys, torch, transformers.models.llama.modeling_llama\n"
        "before = set(sys.modules)\n"
        "import interp.monet\n"
        f"print(json.dumps([h for h in {HEAVY} if h in sys.modules and h not in before]))\n"
    )
    assert json.loads(in_fresh_python(code)) == []


def test_importing_leaves_torch_as_it_was():
    """No default device, dtype, threads, grad mode or random state is touched."""
    code = (
        "import importlib, torch, transformers\n"
        "def state():\n"
        "    return (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(),\n"
        "            torch.get_default_device(), torch.random.get_rng_state().tolist())\n"
        "before = state()\n"
        f"for name in {MODULES}: importlib.import_module(name)\n"
        "print(state() == before)\n"
    )
    assert in_fresh_python(code).strip() == "True"


@pytest.mark.parametrize("name", interp.__all__)
def test_every_public_name_is_there(name):
    assert getattr(interp, name) is not None


def test_public_names_and_their_homes_agree():
    assert set(interp.__all__) == {"__version__", *interp._HOME, *interp._MODULES}
    for name, home in interp._HOME.items():
        assert getattr(interp, name) is getattr(importlib.import_module(home), name)
        assert getattr(interp, name).__module__ == home  # its true home, not a module that merely imports it
    assert set(interp.__all__) <= set(dir(interp))


def test_unknown_name_lists_what_there_is():
    with pytest.raises(AttributeError, match=r"interp has no 'capture'; it has .*load"):
        _ = interp.capture


def test_version_is_the_distributions():
    from importlib.metadata import version

    assert version("interp") == interp.__version__


@pytest.mark.parametrize("package", ["probes", "steering"])
def test_the_packages_beside_load_their_libraries_when_used(package):
    code = f"import {package}, sys; print([m for m in {HEAVY} if m in sys.modules])"
    assert in_fresh_python(code).strip() == "[]"


@pytest.mark.parametrize("package", ["interp", "interp.sae", "probes", "steering"])
def test_public_names_are_ours_after_nnsight_gave_every_object_a_save(package):
    code = (f"import nnsight, {package} as p; "
            "print([n for n in p.__all__ if 'nnsight' in str(getattr(getattr(p, n), '__module__', ''))])")  # fmt: skip
    assert in_fresh_python(code).strip() == "[]"
