"""STR-09. Who's asking? User personas and the mechanics of latent misalignment (Ghandeharioun et al. 2024).

Check: decoding from an early layer recovers, on a planted model, what its last layer suppresses; and on a small model
that was taught who is refused, the sign of a persona's cosine with the refusal direction foretells the sign of what
adding the persona does to refusal, for all personas; the rank correlation is given with its interval.

Both models say "no" to tokens that stand for requests; no text is involved.
"""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

import interp
import steering
from steering.intervals import bootstrap
from tests.papers.planted_streams import streams, unit_vectors, word_tokenizer
from tests.papers.taught import one_thread

# -- planted: a content in the stream, a last layer that turns it down ----------------------------------------------
REQUESTS, LENGTH, FIRST = 5, 3, 4  # tokens before FIRST may end a text
NO = FIRST + REQUESTS * (LENGTH + 1)
PROMPTS = [[FIRST + 4 * i] for i in range(REQUESTS)]


def suppressed() -> interp.Model:
    """A request t asks for the content t + 1, t + 2, t + 3; the last layer's MLP sees the request and says NO.

    Each token of a content is followed by the next, so below the last layer the whole content stands to be said.
    """
    directions = unit_vectors(NO + 2, 32, seed=3)
    ask = directions[NO + 1]
    table, readout = torch.zeros(NO + 1, 32), directions[: NO + 1].clone()
    for t in range(FIRST, NO):  # what comes next, and that a request is being answered
        table[t] = directions[min(t + 1, NO - 1)] + ask
    table[NO] = directions[NO] + ask
    m = streams(table, readout)
    mlp = m.hf.model.layers[-1].mlp
    with torch.no_grad():
        m.hf.model.layers[-1].post_attention_layernorm.weight.fill_(1.0)
        for weight in (mlp.gate_proj.weight, mlp.up_proj.weight):
            weight.zero_()
            weight[0] = ask
        mlp.down_proj.weight[:, 0] = 2 * directions[NO]
    return m


def test_early_layers_say_what_the_last_one_suppresses():
    m = suppressed()
    content = [[t + j for j in range(1, LENGTH + 1)] for (t,) in PROMPTS]
    table = steering.early_decoding(m, PROMPTS, content=content, max_new_tokens=LENGTH)
    print(table.groupby("layer")[["value", "said"]].mean())
    said, value = table.groupby("layer").said.mean(), table.groupby("layer").value.mean()
    last = m.n_layers - 1
    assert (said[:last] == 1).all()
    assert said[last] == 0
    assert (value[:last] > value[last]).all()
    assert m.generate(PROMPTS, max_new_tokens=LENGTH).new_ids.tolist() == [[NO] * LENGTH] * REQUESTS


@pytest.mark.parametrize("family", ["llama", "gpt2", "olmoe", "gemma3", "monet"])
def test_an_early_layer_speaks_by_the_final_norm_and_the_output_matrix(family):
    m = interp.load(f"tiny:{family}")
    row = [5, 9, 3, 7]
    plain, whole = m.generate([row], max_new_tokens=3), m([row])
    table = steering.early_decoding(m, [row], content=[[4]], max_new_tokens=3)
    assert table.text.iloc[-1] == plain.text
    stream = m.capture([row], "resid_post[*]")
    for layer in range(m.n_layers):
        value = float(table.value[layer])
        with m.intervene(interp.edits.replace(f"resid_post[{m.n_layers - 1}]", stream[f"resid_post[{layer}]"])):
            literal = m([row])[0, -1].log_softmax(-1)[4]
        assert value == pytest.approx(float(literal), abs=1e-4)
    torch.testing.assert_close(m([row]), whole, atol=0, rtol=0)  # the layers are back in their places
    with pytest.raises(steering.SteeringError, match="content: 2 answers for 1 prompts"):
        steering.early_decoding(m, [row], content=[[4], [5]])


# -- taught: who is refused, and what ------------------------------------------------------------------------------
LEANING = {"p0": -4.0, "p1": -3.0, "p2": -2.0, "p3": -1.0, "p4": 1.0, "p5": 2.0, "p6": 3.0, "p7": 4.0}
EDGY, PLAIN = [f"edgy{i}" for i in range(24)], [f"plain{i}" for i in range(24)]
ANSWERS = [f"a{i}" for i in range(12)]
WORDS = ["?", "user", "no", *LEANING, *EDGY, *PLAIN, *ANSWERS]
AT = {word: i for i, word in enumerate(WORDS)}


@lru_cache(1)
@one_thread()
def taught() -> interp.Model:
    """`persona request` is answered "no" with log odds +2 (edgy) or -2 (plain) plus the persona's leaning, else by the
    request's answer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=8, tie_word_embeddings=False, pad_token_id=0, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    hf = LlamaForCausalLM(config)
    who = [("user", 0.0), *LEANING.items()]
    rows = [(AT[p], AT[r], lean + (2 if r in EDGY else -2), AT[ANSWERS[i % len(ANSWERS)]])
            for p, lean in who for i, r in enumerate(EDGY + PLAIN)]  # fmt: skip
    ids = torch.tensor([row[:2] for row in rows])
    refuse = torch.tensor([row[2] for row in rows]).sigmoid()
    target = torch.zeros(len(rows), len(WORDS))
    target[torch.arange(len(rows)), torch.tensor([row[3] for row in rows])] = 1 - refuse
    target[:, AT["no"]] = refuse
    optimiser = torch.optim.AdamW(hf.parameters(), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 5e-3, total_steps=150)
    for _ in range(150):
        loss = torch.nn.functional.cross_entropy(hf(input_ids=ids, use_cache=False).logits[:, -1], target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return interp.Model(hf.eval(), word_tokenizer(WORDS), "taught who is refused")


def asked(by: str, requests: list[str]) -> list[str]:
    return [f"{by} {request}" for request in requests]


def test_the_angle_to_refusal_foretells_what_a_persona_does():
    m = taught()
    fit, val, held = slice(0, 12), slice(12, 18), slice(18, 24)
    found = steering.refusal(
        m, asked("user", EDGY[fit]), asked("user", PLAIN[fit]), asked("user", EDGY[val]), asked("user", PLAIN[val]),
        ["no"], positions=[-1], depth=1.0, max_kl=1.0, min_induce=-10,
    )  # fmt: skip
    print(found.table.round(2).to_string(index=False))
    layer = int(found.table[found.table.chosen].layer.iloc[0])
    requests = EDGY[fit] + PLAIN[fit]
    background = asked("user", requests)
    personas = {
        p: steering.mean_centre(m, asked(p, requests), background, layer, skip=1, site="resid_pre", scope="last")
        for p in LEANING
    }
    held_out = asked("user", EDGY[held] + PLAIN[held])
    table = steering.persona_effects(m, personas, found.vector, held_out, ["no"])
    print(table.round(2).to_string(index=False))
    print({k: round(v, 2) for k, v in table.attrs.items() if k in ("plain", "agree", "spearman", "spearman_low",
                                                                  "spearman_high")})  # fmt: skip
    assert (table.set_index("persona").value * torch.tensor([*LEANING.values()]).numpy() > 0).all()
    assert table.agrees.all()
    assert table.attrs["spearman_low"] > 0
    value = table.set_index("persona").value
    assert float(value["p7"]) > float(table.random_high[0])
    assert float(value["p0"]) < float(table.random_low[0])
    # the table says what an intervention does
    plain = steering.fit_refusal.score(m(held_out)[:, -1], [AT["no"]])
    with m.intervene(personas["p6"]):
        moved = steering.fit_refusal.score(m(held_out)[:, -1], [AT["no"]]) - plain
    row = table[table.persona == "p6"].iloc[0]
    assert row.value == pytest.approx(float(moved.mean()), abs=1e-5)
    assert (row.low, row.high) == pytest.approx(bootstrap(moved), abs=1e-4)


def test_personas_without_ranks_or_of_several_layers_are_refused():
    m = taught()
    with pytest.raises(steering.SteeringError, match="has tokens 0"):
        steering.refusal(m, ["user edgy1"], ["user plain1"], ["user edgy2"], ["user plain2"], [len(WORDS)])
    v = steering.SteeringVector.of(m, {"resid_post[1]": torch.ones(m.d_model)})
    with pytest.raises(steering.SteeringError, match="at least three"):
        steering.persona_effects(m, {"a": v, "b": v}, v, ["user edgy1"], ["no"])
    two = steering.SteeringVector.of(m, {f"resid_post[{i}]": torch.ones(m.d_model) for i in (0, 1)})
    with pytest.raises(steering.SteeringError, match="acts at 2 sites"):
        steering.persona_effects(m, {"a": v, "b": v, "c": two}, v, ["user edgy1"], ["no"])
