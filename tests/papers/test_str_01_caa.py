"""STR-01. Steering Llama 2 via Contrastive Activation Addition (Rimsky et al. 2024, arXiv:2312.06681).

Check: the vector has a cosine of at least .99 with a planted direction; the mean probability of the matching answer
on held-out items rises over k = -1, 0, 1 and beats random vectors of its norm; only the stated positions change, with
and without a cache alike to 1e-4.

The lettered answers of the paper are checked on the planted model. SmolLM2-135M binds no letters to options, so on it
the likelihood of whole answers is read instead, on a small set of our own.
"""

from __future__ import annotations

import pytest
import torch

import steering
from steering.intervals import bootstrap
from steering.planted import AGAINST, WITH, Planted
from steering.propensity import propensities

TRAIN = [
    ("How was the party?", " It was wonderful, everyone laughed.", " It was awful, everyone left early."),
    ("How is the weather?", " Lovely, the sun is out.", " Dreadful, it rains all day."),
    ("What is your new job like?", " Great, I enjoy every day of it.", " Terrible, I hate every day of it."),
    ("How did the exam go?", " Very well, I am so pleased.", " Very badly, I am so upset."),
    ("What do you think of the film?", " A joy from start to end.", " A bore from start to end."),
    ("How is your sister?", " She is happy and well.", " She is sad and ill."),
    ("Tell me about your trip.", " We had a delightful time.", " We had a miserable time."),
    ("How was the dinner?", " Delicious, I loved it.", " Disgusting, I hated it."),
    ("How do you feel today?", " I feel cheerful and full of hope.", " I feel gloomy and without hope."),
    ("What is the town like?", " Charming, with friendly people.", " Ugly, with rude people."),
    ("How is the book?", " Brilliant, I could not put it down.", " Dull, I could not finish it."),
    ("How was your day?", " Good, everything went right.", " Bad, everything went wrong."),
]
HELD_OUT = [
    ("How is the new school?", " The children love it.", " The children hate it."),
    ("How was the concert?", " Beautiful, I was moved.", " Horrible, I was bored."),
    ("What about the garden?", " It blooms and smells sweet.", " It is dead and smells foul."),
    ("How is grandfather?", " Strong and in good spirits.", " Weak and in low spirits."),
    ("How did the meeting go?", " Splendidly, we all agreed.", " Poorly, we all argued."),
    ("What do you say of the hotel?", " Clean, bright and welcoming.", " Dirty, dark and unwelcoming."),
    ("How was the match?", " Thrilling, our team won.", " Painful, our team lost."),
    ("What is the plan like?", " Excellent, it will succeed.", " Hopeless, it will fail."),
    ("How are the neighbours?", " Kind, they always help.", " Nasty, they always complain."),
    ("How is the soup?", " Tasty and warm.", " Tasteless and cold."),
]  # fmt: skip


def beats(table, k):
    """Bootstrap interval over items of the effect of k, less the mean effect of the random vectors."""
    own, random = (
        part.groupby(["item", "multiplier"]).value.mean().unstack()
        for part in (table[table.baseline == "none"], table[table.baseline == "random"])
    )
    return bootstrap((own[k] - own[0.0]) - (random[k] - random[0.0]))


@pytest.mark.parametrize("at", ["answer", -1])
def test_planted_direction_is_found_and_moves_the_matching_letter(at):
    p = Planted(offset=3.0)
    with torch.no_grad():  # two letters: (A) is read from the direction, (B) from its opposite
        p.m.hf.lm_head.weight.zero_()
        p.m.hf.lm_head.weight[WITH], p.m.hf.lm_head.weight[AGAINST] = p.direction, -p.direction
        p.m.hf.model.norm.weight.fill_(1.0)
    v = steering.caa(p.m, p.pairs(), layer=1, at=at)
    assert v.cosine(p.direction) >= 0.99
    items = [(prompt, [WITH], [AGAINST]) for prompt, _, _ in p.pairs(30, seed=7)]
    table = propensities(p.m, v, items, [-1, 0, 1])
    letter = (1 / (1 + (-table.value).map(torch.tensor(1.0).new_tensor).map(torch.exp))).astype(float)
    mean = letter[table.baseline == "none"].groupby(table.multiplier).mean()
    print("P(matching letter):", mean.round(3).to_dict())
    assert mean[-1] < mean[0] < mean[1]
    assert beats(table, 1.0)[0] > 0


def test_only_the_stated_positions_change_with_and_without_a_cache():
    p = Planted()
    v = steering.caa(p.m, p.pairs(), layer=1) * 2
    prompt = [[10, 11, 12, 13], [14, 15]]
    with p.m.intervene(v) as cached:
        a = p.m.generate(prompt, max_new_tokens=5, capture="resid_post[1]")
    with p.m.intervene(v) as plain:
        b = p.m.generate(prompt, max_new_tokens=5, capture="resid_post[1]", use_cache=False)
    assert cached.trace().equals(plain.trace())
    assert cached.trace().groupby("batch").position.agg(["min", "max"]).values.tolist() == [[3, 7], [1, 5]]
    difference = (a.acts["resid_post[1]"] - b.acts["resid_post[1]"])[a.acts.mask].abs().max()
    assert float(difference) <= 1e-4


@pytest.mark.smollm2
def test_on_smollm2_the_likelihood_of_cheerful_answers_rises_and_beats_random_vectors(smollm2):
    v = steering.caa(smollm2, TRAIN, layer=15)
    table = propensities(smollm2, v, HELD_OUT, [-1, 0, 1])
    mean = table.groupby(["baseline", "multiplier"]).value.mean()
    print(mean.round(3).to_dict(), beats(table, 1.0), beats(table, -1.0))
    assert mean["none", -1.0] < mean["none", 0.0] < mean["none", 1.0]
    assert beats(table, 1.0)[0] > 0
    assert beats(table, -1.0)[1] < 0
