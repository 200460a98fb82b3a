"""The doctor: what it reports is what is there, and what it warns of follows from the report."""

from __future__ import annotations

import copy
import io
import json
from importlib.metadata import version

import pytest
import torch

from interp import doctor
from interp.zoo import cache


@pytest.fixture
def healthy():
    """The report of a machine on which everything works."""
    return {
        "interp": "0",
        "python": "3.12",
        "platform": "Linux",
        "packages": [
            {"package": "torch", "version": "2.13.0", "needed": ">=2.6", "extra": "", "fits": True},
            {"package": "transformer-lens", "version": "4.3.0", "needed": "<5", "extra": "bridges", "fits": True},
        ],
        "devices": [
            {"device": "cpu", "name": "Xeon", "cores": 8, "threads": 8, "vector": "AVX512", "bfloat16": ["amx_bf16"]},
            {"device": "cuda:0", "name": "GPU", "memory": 2**36, "bfloat16": ["native"]},
        ],
        "memory": {"total": 2**35, "available": 2**34},
        "cache": {"directory": "/c", "free": 2**40, "models": []},
        "hub": {"endpoint": "https://hub", "unreachable": None},
        "problems": [],
    }


def whats(report) -> set[str]:
    return {row["what"] for row in doctor.problems(report)}


def changed(report, **changes):
    return {**copy.deepcopy(report), **changes}


def test_healthy_machine_has_no_problem(healthy):
    assert doctor.problems(healthy) == []


def test_missing_package_names_its_extra(healthy):
    healthy["packages"].append(
        {"package": "nnsight", "version": None, "needed": ">=0.8", "extra": "bridges", "fits": False}
    )
    healthy["packages"].append({"package": "ruff", "version": None, "needed": ">=0", "extra": "dev", "fits": False})
    (problem,) = doctor.problems(healthy)  # a missing tool for developers is none
    assert problem == {
        "what": "nnsight bridge",
        "why": "nnsight: not installed",
        "mend": "pip install 'interp[bridges]'",
    }


def test_package_that_is_too_old_is_named(healthy):
    healthy["packages"][0] |= {"version": "2.1.0", "fits": False}
    assert doctor.problems(healthy)[0]["why"] == "torch: version 2.1.0, needs >=2.6"


def test_old_transformer_lens_is_known_to_be_wrong_on_deepseek(healthy):
    healthy["packages"][1]["version"] = "3.9.0"
    assert "TransformerBridge of DeepSeek V2 and V3" in whats(healthy)


@pytest.mark.parametrize(("lens", "expected"), [("4.3.0", "import sae_lens"), ("3.9.0", "transformer-lens 4")])
def test_the_clash_of_sae_lens_and_transformer_lens_is_told_either_way(healthy, monkeypatch, lens, expected):
    healthy["packages"][1]["version"] = lens
    sae = {"package": "sae-lens", "version": "6.54.12", "needed": ">=6.50", "extra": "bridges", "fits": True}
    healthy["packages"].append(sae)
    capped = ["transformer-lens<4.0.0,>=2.16.1", "torch"]
    monkeypatch.setattr(doctor, "requires", lambda package: capped if package == "sae-lens" else [])
    assert expected in whats(healthy)
    monkeypatch.setattr(doctor, "requires", lambda package: ["transformer-lens>=2.16.1"])  # once the cap is lifted
    assert expected not in whats(healthy)


def test_slow_bfloat16_no_accelerator_no_hub(healthy):
    cpu = {**healthy["devices"][0], "bfloat16": []}
    assert whats(changed(healthy, devices=[cpu])) == {"fast bfloat16 on the processor", "CUDA and MPS"}
    assert whats(changed(healthy, hub={"unreachable": "offline mode"})) == {"models by hub id"}


def test_full_disk_and_damaged_entry(healthy):
    small = {"directory": "/c", "free": 10**6, "models": []}
    assert whats(changed(healthy, cache=small)) == {"smollm2"}
    broken = {"name": "smollm2", "bytes": 1, "source": None, "weights": None, "fault": "config.json: no bytes"}
    assert whats(changed(healthy, cache={**small, "models": [broken]})) == {"cached smollm2"}


def test_report_says_what_is_installed_and_is_plain_json(monkeypatch, tmp_path):
    monkeypatch.setenv("INTERP_CACHE", str(tmp_path))
    report = doctor.report()
    assert json.loads(json.dumps(report)) == report
    versions = {row["package"]: row["version"] for row in report["packages"]}
    assert versions["torch"] == torch.__version__
    assert versions["transformers"] == version("transformers")
    assert all(row["fits"] for row in report["packages"] if not row["extra"])
    assert report["devices"][0]["threads"] == torch.get_num_threads()
    assert 0 < report["memory"]["available"] <= report["memory"]["total"]
    assert report["cache"]["models"] == []
    assert len(report["devices"]) == 1 + torch.cuda.device_count() + torch.backends.mps.is_available()


def test_cache_is_listed_with_sizes_and_faults(monkeypatch, tmp_path):
    monkeypatch.setenv("INTERP_CACHE", str(tmp_path))
    with cache.locked("little"), cache.building("little") as (path, card):
        (path / "weights").write_bytes(b"x" * 5000)
        card["source"] = "wheel"
    (whole,) = doctor.cached()["models"]
    assert whole["fault"] is None
    assert whole["bytes"] == 5000
    (tmp_path / "models" / "little" / "weights").write_bytes(b"x")
    assert doctor.cached()["models"][0]["fault"] == "weights: 1 bytes, 5000 expected"


def test_memory_without_psutil(monkeypatch):
    with_psutil = doctor.memory()
    monkeypatch.setitem(__import__("sys").modules, "psutil", None)
    without = doctor.memory()
    if without["total"] is not None:  # Linux
        assert without["total"] == with_psutil["total"]


def test_what_is_shown_is_escaped(healthy):
    from rich.console import Console

    healthy["devices"][0]["name"] = "[red]odd[/red]"
    healthy["problems"] = [{"what": "[b]", "why": "[/nothing]", "mend": "none"}]
    out = io.StringIO()
    doctor.show(healthy, Console(file=out, width=200))
    assert "[red]odd[/red]" in out.getvalue()
    assert "[/nothing]" in out.getvalue()


@pytest.mark.parametrize(("n", "text"), [(None, "unknown"), (5 * 2**20, "5 MiB"), (3 * 2**30, "3.0 GiB")])
def test_sizes(n, text):
    assert doctor.size(n) == text
