"""STR-02. Improving Activation Steering in Language Models with Mean-Centring (Jorgensen 2023, arXiv:2312.03813).

Check: with a large offset that all activations share, the centred vector has a cosine of at least .99 with the
planted direction and the uncentred at most .7; a held-out shift of genre at equal norm beats the uncentred vector and
random ones. The same function takes the mean off function vectors (HED-07). The genre is read as the likelihood of
held-out sentences of it against plain ones, on SmolLM2 with texts of our own. Whether first tokens count in the means
is chosen on some sentences and confirmed on others.
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
CHOOSING = [
    ("The next morning", " the ship left the harbour under full sail.", " the family left the house by the back door."),
    ("I remember how", " the waves rose above the deck.", " the lights went out in the street."),
    ("They looked up and saw", " the sails torn by the storm.", " the clock above the station."),
    ("He told us about", " the islands beyond the ocean.", " the prices in the supermarket."),
    ("Nobody knew where", " the captain had hidden the map.", " the teacher had put the papers."),
    ("At last she found", " the wreck beneath the tide.", " the keys beneath the sofa."),
    ("In the evening", " the sailors sang on the pier.", " the neighbours watched television."),
    ("It was the sound of", " the anchor striking the reef.", " the phone ringing in the hall."),
]
CONFIRMING = [
    ("In the old photograph", " the crew stood on the deck of a brig.", " the class stood on the steps of a school."),
    (
        "Before breakfast",
        " they scrubbed the planks and coiled the ropes.",
        " they swept the stairs and made the beds.",
    ),
    ("The letter said that", " the frigate had run aground.", " the bank had raised its fees."),
    ("Far away we could see", " a lighthouse above the surf.", " a tower above the roofs."),
    ("She had learnt to", " steer by the stars.", " type with ten fingers."),
    ("What woke him was", " the roar of the breakers.", " the noise of the lorry."),
    ("By the end of the week", " the fleet had rounded the cape.", " the team had finished the plan."),
    ("His uncle had been", " a boatswain on a whaling ship.", " a clerk in an insurance office."),
    ("They were afraid of", " sharks and squalls.", " dogs and thieves."),
    ("The price included", " a hammock below deck.", " a room with breakfast."),
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
    def vectors(skip):
        centred = steering.mean_centre(smollm2, SEA, PLAIN, layer=15, skip=skip)
        return centred, steering.mean_centre(smollm2, SEA, None, layer=15, skip=skip).with_norm(centred.norm)

    def gains(skip, items, controls):
        centred, uncentred = vectors(skip)
        table = propensities(smollm2, centred, items, [0, 1], controls=controls, baselines={"uncentred": uncentred})
        by = table.groupby(["baseline", "multiplier", "item"]).value.mean()
        return {name: (by[name, 1.0] - by[name, 0.0]).to_numpy() for name in by.index.unique("baseline")}

    # SmolLM2's first tokens are a hundred times as large as all others, so with them a mean is mostly noise
    margin = {}
    for skip in (0, 1):
        gain = gains(skip, CHOOSING, 0)
        margin[skip] = float((gain["none"] - gain["uncentred"]).mean())
    skip = max(margin, key=margin.get)
    print(f"centred less uncentred where it is chosen: {margin}; chosen: skip={skip}")
    gain = gains(skip, CONFIRMING, 20)
    print("on fresh sentences:", {name: round(float(g.mean()), 3) for name, g in gain.items()})
    for rival in ("uncentred", "random"):
        low, high = bootstrap(gain["none"] - gain[rival])
        print(f"centred less {rival}: {low:.3f} .. {high:.3f}")
        assert low > 0
