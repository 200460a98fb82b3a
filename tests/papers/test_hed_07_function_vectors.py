"""HED-07. Function Vectors in Large Language Models (Todd et al. 2024, arXiv:2310.15213).

Check, the half that is exact: on a planted in-context learner the vector from the top heads has a cosine of at least
.99 with the task's, and zero-shot it does the task. The other half (accuracy on real tasks beyond vectors of random
heads, composition, output vocabulary) is open.
"""

from __future__ import annotations

import torch

import interp
import steering
from steering.planted import NEUTRAL, WITH
from steering.planted import Planted as _Planted
from steering.tasks import right, zero_shot

LAYER, HEAD = 1, 2
PLAIN = ("{}", " ", " ")


def words():
    """A tokenizer of one token per word: w0..w99."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({f"w{i}": i for i in range(101)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="w0", pad_token="w0")


def learner():
    """Answers w(40 + i) to w(10 + i), but only behind examples of it: one head carries what they have in common.

    Outputs carry the direction u; the head looks at all tokens alike, reads the share of u, and writes u. With u at
    the last token, the query's embedding is likest to that of its output.
    """
    p = _Planted()
    m = interp.Model(p.m.hf, words(), "learner")
    attention, d = m.hf.model.layers[LAYER].self_attn, m.d_head
    code = torch.nn.functional.normalize(torch.randn(d, generator=torch.Generator().manual_seed(5)), dim=0)
    with torch.no_grad():
        m.hf.model.layers[LAYER].input_layernorm.weight.fill_(1.0)
        m.hf.model.norm.weight.fill_(1.0)
        attention.q_proj.weight.zero_()
        attention.k_proj.weight.zero_()
        attention.v_proj.weight.zero_()
        kv = HEAD * m.n_kv_heads // m.n_heads
        attention.v_proj.weight[kv * d : (kv + 1) * d] = torch.outer(code, p.direction)
        attention.o_proj.weight[:, HEAD * d : (HEAD + 1) * d] = 6 * torch.outer(p.direction, code)
        m.hf.lm_head.weight.copy_(p.table)
        m.hf.lm_head.weight[:NEUTRAL] = 0
        m.hf.lm_head.weight[WITH : WITH + 30] -= 0.02 * p.direction  # of two equals, the neutral one
    return m, p.direction


def test_the_planted_task_is_recovered_from_its_head():
    m, direction = learner()
    task = [(f"w{10 + i}", f"w{40 + i}") for i in range(30)]
    held, fit = task[:8], task[8:]
    v = steering.function_vector(
        m, fit, layer=1, heads=1, shots=6, n=30, trials=10, corrupt="zero_shot", template=PLAIN
    )
    assert v.record["heads"][0][:2] == [LAYER, HEAD]
    print("cosine with the task's vector:", v.cosine(direction), "effect", v.record["heads"][0][2])
    assert v.cosine(direction) >= 0.99
    plain, steered = (right(m, zero_shot(held, PLAIN), *e) for e in ([], v.as_edits(m)))
    print("zero-shot accuracy:", sum(plain) / 8, "->", sum(steered) / 8)
    assert sum(plain) <= 2  # now and then the likeliest token by chance
    assert sum(steered) == 8
