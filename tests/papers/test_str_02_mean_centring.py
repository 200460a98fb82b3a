"""STR-02. Improving Activation Steering in Language Models with Mean-Centring (Jorgensen 2023, arXiv:2312.03813).

Check: with a large offset that all activations share, the centred vector has a cosine of at least .99 with the
planted direction and the uncentred at most .7; a held-out shift of genre at equal norm beats the uncentred vector and
random ones. The same function takes the mean off function vectors (HED-07). The genre is read as the likelihood of
held-out sentences of it against plain ones, on SmolLM2 with texts of our own.
"""

from __future__ import annotations

import pytest

import steering
from steering.intervals import bootstrap
from steering.planted import COUNT, NEUTRAL, WITH, Planted
from steering.propensity import propensities

SEA = [
    "The captain shouted from the deck as the waves broke over the bow of the ship.",
    "We hoisted the sails at dawn and the harbour sank behind the horizon.",
    "The sailors pulled the anchor from the deep and sang of far islands.",
    "A storm rolled over the ocean and the mast cracked in the wind.",
    "The old whaler leaned on the rail and watched the tide turn.",
    "Salt spray covered the cabin windows while the helmsman held the course.",
    "From the crow's nest the boy cried that he saw land across the water.",
    "The pirates lowered a boat and rowed through the fog to the reef.",
    "Gulls circled over the pier where the fishing fleet lay moored.",
    "The schooner heeled in the gale and the crew clung to the ropes.",
]
PLAIN = [
    "The committee meets on the first Monday of each month to review the budget.",
    "She bought bread, milk and two pounds of apples at the shop on the corner.",
    "The report describes how the company changed its policy last year.",
    "He parked the car behind the library and walked to the office.",
    "Students must hand in the form before the end of the week.",
    "The museum opens at nine and closes at five, except on holidays.",
    "A new study finds that people sleep less than they did ten years ago.",
    "The recipe calls for flour, butter, sugar and a pinch of cinnamon.",
    "They painted the kitchen yellow and put new tiles on the floor.",
    "The train to the city leaves every half hour from platform two.",
]
HELD_OUT = [
    ("The next morning", " the ship left the harbour under full sail.", " the family left the house by the back door."),
    ("I remember how", " the waves rose above the deck.", " the lights went out in the street."),
    ("They looked up and saw", " the sails torn by the storm.", " the clock above the station."),
    ("He told us about", " the islands beyond the ocean.", " the prices in the supermarket."),
    ("Nobody knew where", " the captain had hidden the map.", " the teacher had put the papers."),
    ("At last she found", " the wreck beneath the tide.", " the keys beneath the sofa."),
    ("In the evening", " the sailors sang on the pier.", " the neighbours watched television."),
    ("It was the sound of", " the anchor striking the reef.", " the phone ringing in the hall."),
]


def test_centring_takes_off_the_large_offset_that_hides_the_direction():
    p = Planted(offset=30.0)
    target, background = ([[start + i] for i in range(COUNT)] for start in (WITH, NEUTRAL))
    centred = steering.mean_centre(p.m, target, background, layer=1).cosine(p.direction)
    uncentred = steering.mean_centre(p.m, target, None, layer=1).cosine(p.direction)
    print(f"cosine with the planted direction: centred {centred:.4f}, uncentred {uncentred:.4f}")
    assert centred >= 0.99
    assert abs(uncentred) <= 0.7


@pytest.mark.smollm2
def test_genre_shift_at_equal_norm_beats_uncentred_and_random(smollm2):
    # first tokens are left out: SmolLM2's are a hundred times as large as all others
    centred = steering.mean_centre(smollm2, SEA, PLAIN, layer=15, skip=1)
    uncentred = steering.mean_centre(smollm2, SEA, None, layer=15, skip=1).with_norm(centred.norm)
    table = propensities(smollm2, centred, HELD_OUT, [0, 1], baselines={"uncentred": uncentred})
    by = {name: part.groupby(["item", "multiplier"]).value.mean().unstack() for name, part in table.groupby("baseline")}
    gain = {name: part[1.0] - part[0.0] for name, part in by.items()}
    print({name: round(float(g.mean()), 3) for name, g in gain.items()}, "norm", round(centred.norm, 2))
    for rival in ("uncentred", "random"):
        low, high = bootstrap(gain["none"] - gain[rival])
        print(f"centred less {rival}: {low:.3f} .. {high:.3f}")
        assert low > 0
