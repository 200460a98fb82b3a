"""llama.cpp itself, given our control vector, says what the steered model says. Needs the package llama-cpp-python.

The model is written as a GGUF of 32-bit floats and the cache is kept in them too, so nothing is quantised and logits
must agree to rounding. The vector goes in as llama.cpp's own loader puts it: direction l at row l - 1.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest
import torch

import interp
from steering import SteeringVector, to_gguf

llama = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed; it is built from source by pip")

IDS = [5, 9, 3, 7, 42, 11]


def write(m, path: Path) -> None:
    """`m`, of the family llama, as a GGUF of float32 without a tokenizer."""
    from gguf import GGUFWriter

    c, state = m.hf.config, m.hf.state_dict()
    n_kv, d_head = c.num_key_value_heads, m.d_head
    w = GGUFWriter(str(path), "llama")
    w.add_vocab_size(c.vocab_size)
    w.add_tokenizer_model("none")
    w.add_context_length(64)
    w.add_embedding_length(c.hidden_size)
    w.add_block_count(c.num_hidden_layers)
    w.add_feed_forward_length(c.intermediate_size)
    w.add_head_count(c.num_attention_heads)
    w.add_head_count_kv(n_kv)
    w.add_key_length(d_head)
    w.add_value_length(d_head)
    w.add_rope_dimension_count(d_head)
    w.add_rope_freq_base(float(c.rope_parameters["rope_theta"]))
    w.add_layer_norm_rms_eps(c.rms_norm_eps)
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
             "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
             "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
             "post_attention_layernorm": "ffn_norm"}  # fmt: skip
    tensors = {"token_embd": state["model.embed_tokens.weight"], "output_norm": state["model.norm.weight"]}
    if not c.tie_word_embeddings:
        tensors["output"] = state["lm_head.weight"]
    for layer in range(c.num_hidden_layers):
        for theirs, ours in names.items():
            value = state[f"model.layers.{layer}.{theirs}.weight"]
            heads = {"attn_q": c.num_attention_heads, "attn_k": n_kv}.get(ours)
            if heads:  # llama.cpp turns neighbouring pairs, transformers the two halves of a head
                value = value.view(heads, 2, d_head // 2, -1).transpose(1, 2).reshape(value.shape)
            tensors[f"blk.{layer}.{ours}"] = value
    for name, value in tensors.items():
        w.add_tensor(f"{name}.weight", np.ascontiguousarray(value.float().numpy()))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def rows(vector: Path, m) -> np.ndarray:
    """A control vector's file as llama.cpp's loader lays it out: [layer 1 .. n - 1, d_model]."""
    from gguf import GGUFReader

    found = np.zeros((m.n_layers - 1, m.d_model), np.float32)
    for tensor in GGUFReader(str(vector)).tensors:
        found[int(tensor.name.rpartition(".")[2]) - 1] = tensor.data
    return found


def logits(m, model: Path, vector: Path | None) -> torch.Tensor:
    """llama.cpp's logits [pos, vocab] on `IDS`."""
    llama.llama_backend_init()
    loaded = llama.llama_model_load_from_file(str(model).encode(), llama.llama_model_default_params())
    assert loaded, "llama.cpp does not take the model"
    settings = llama.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_threads, settings.n_threads_batch = 64, 64, 1, 1
    settings.type_k = settings.type_v = 0  # 32-bit floats
    context = llama.llama_init_from_model(loaded, settings)
    if vector is not None:
        data = rows(vector, m)
        put = getattr(llama, "llama_set_adapter_cvec", None) or llama.llama_apply_adapter_cvec
        pointer = data.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        assert put(context, pointer, data.size, m.d_model, 1, m.n_layers) == 0
    batch = llama.llama_batch_init(len(IDS), 0, 1)
    batch.n_tokens = len(IDS)
    for i, token in enumerate(IDS):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, 1
    assert llama.llama_decode(context, batch) == 0
    shape = (len(IDS), m.hf.config.vocab_size)
    found = torch.from_numpy(np.ctypeslib.as_array(llama.llama_get_logits(context), shape=shape).copy())
    llama.llama_batch_free(batch)
    llama.llama_free(context)
    llama.llama_model_free(loaded)
    return found


def test_llama_cpp_steers_as_we_do(tmp_path):
    m = interp.load("tiny:llama")
    g = torch.Generator().manual_seed(11)
    v = SteeringVector.of(m, {f"resid_post[{i}]": torch.randn(m.d_model, generator=g) for i in (1, 2)}, scope="all")
    write(m, tmp_path / "model.gguf")
    plain = m([IDS])[0]
    torch.testing.assert_close(logits(m, tmp_path / "model.gguf", None), plain, atol=1e-4, rtol=1e-4)
    with m.intervene(v):
        steered = m([IDS])[0]
    assert float((steered - plain).abs().max()) > 0.1
    found = logits(m, tmp_path / "model.gguf", to_gguf(m, v, tmp_path / "v.gguf"))
    torch.testing.assert_close(found, steered, atol=1e-4, rtol=1e-4)
