"""STR-10. Identifying and Manipulating Personality Traits in LLMs Through Activation Engineering (arXiv:2412.10427).

Check: trait directions from contrast texts; held-out inventory items shift to the trait, beyond random vectors; the
trait x trait matrices of side effects and of cosines are exported. On SmolLM2, by the likelihood of whole answers, on
three traits of our own: cheerful, formal, curious.
"""

from __future__ import annotations

import pandas as pd
import pytest

import steering
from steering.intervals import bootstrap
from steering.propensity import propensities

TRAITS = {
    "cheerful": (
        [
            ("How was your weekend?", " Wonderful, I laughed a lot.", " Awful, I cried a lot."),
            ("What is ahead of us?", " Bright days full of joy.", " Dark days full of grief."),
            ("How do you feel?", " Happy and thankful.", " Sad and bitter."),
            ("What of your friends?", " They make me smile.", " They make me weep."),
            ("How is work?", " A pleasure every morning.", " A burden every morning."),
            ("What do you see outside?", " A lovely sunny street.", " A dismal rainy street."),
        ],
        [
            ("How was the visit?", " Delightful, we had fun.", " Dreadful, we had pain."),
            ("What will tomorrow bring?", " Good news, I am sure.", " Bad news, I am sure."),
            ("How is your home?", " Warm and merry.", " Cold and gloomy."),
            ("What do you think of life?", " It is beautiful.", " It is miserable."),
            ("How did the game end?", " With cheers and hugs.", " With tears and blame."),
        ],
    ),
    "formal": (
        [
            (
                "Please reply to the guest.",
                " We would be honoured to receive you, Madam.",
                " Yeah sure, come over, whatever.",
            ),
            ("Say that you are late.", " I regret to inform you of a delay.", " Gonna be late, sorry dude."),
            ("Thank them.", " Please accept our sincere gratitude.", " Thanks a bunch, guys!"),
            ("Ask for help.", " Might I request your kind assistance?", " Hey, can you gimme a hand?"),
            ("Decline the offer.", " We must respectfully decline.", " Nah, no way, not for me."),
            ("Greet the reader.", " Dear Sir or Madam,", " Hey there, what's up,"),
        ],
        [
            ("Close the letter.", " Yours faithfully,", " See ya later,"),
            ("Say that you agree.", " I concur with your assessment.", " Yep, totally, you bet."),
            ("Ask them to wait.", " Kindly remain seated for a moment.", " Hang on a sec, okay?"),
            ("Complain about the noise.", " I wish to lodge a complaint.", " Shut up over there, man!"),
            ("Invite a colleague.", " You are cordially invited to attend.", " Wanna hang out with us?"),
        ],
    ),
    "curious": (
        [
            ("You find a strange box.", " I wonder what is inside, let me open it.", " I do not care, I leave it."),
            ("A lecture on bees is held.", " I must hear more about them!", " That is boring, I stay home."),
            (
                "Someone speaks an unknown language.",
                " Which one is it, and how does it work?",
                " Never mind what it is.",
            ),
            ("A path leads into the wood.", " Let us find out where it goes.", " Let us stay where we are."),
            ("The machine makes a new sound.", " Why does it do that? I will look.", " Just ignore it."),
            ("Your friend studies stars.", " Tell me all that you know!", " Talk about something else."),
        ],
        [
            ("There is an old map.", " What does this sign mean, I wonder?", " Throw it away."),
            ("A museum has opened.", " I want to explore every room.", " I would rather not go."),
            ("The child asks a question.", " Let us look up the answer together.", " Stop asking, be quiet."),
            ("A new dish is served.", " How is it made? I will try it.", " I only eat what I know."),
            ("You hear of a cave.", " How deep is it? Let us explore!", " It does not matter to me."),
        ],
    ),
}


@pytest.mark.smollm2
def test_traits_shift_held_out_items_and_their_side_effects_are_told(smollm2):
    vectors = {name: steering.caa(smollm2, fit, layer=15) for name, (fit, _) in TRAITS.items()}
    vectors = dict(zip(vectors, steering.equalise(list(vectors.values())), strict=True))
    cosines = steering.cosines(vectors)
    effects = {}
    for name, v in vectors.items():
        for other, (_, held) in TRAITS.items():
            controls = 20 if name == other else 0
            table = propensities(smollm2, v, held, [0, 1], controls=controls)
            by = {
                k: part.groupby(["item", "multiplier"]).value.mean().unstack() for k, part in table.groupby("baseline")
            }
            gain = by["none"][1.0] - by["none"][0.0]
            effects[name, other] = float(gain.mean())
            if controls:
                low, high = bootstrap(gain - (by["random"][1.0] - by["random"][0.0]))
                print(f"{name}: {float(gain.mean()):+.3f} nats per token; less random {low:.3f} .. {high:.3f}")
                assert low > 0
    matrix = pd.Series(effects).unstack()
    print("cosines\n", cosines.round(2), "\neffect of a row's vector on a column's items\n", matrix.round(3))
    assert set(matrix.index) == set(cosines.index) == set(TRAITS)
    for name in TRAITS:
        assert matrix.loc[name, name] == matrix[name].max()
