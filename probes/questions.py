"""Ready questions: does a model represent X, where, and does moving along it move the output as X would?

    answer = ask(m, "sentiment")
    print(answer.text)                what was found, in two sentences
    answer.layers, answer.causal      the tables behind it

Each question is a set of short texts with labels; groups keep what the label could be read from by heart (the word, the
country, the name) on one side of the split, so the probe is scored on words it never saw. For the causal check there
are
prompts of their own and two sets of next tokens: pushed along the probe's direction, the model should come to prefer
the first set over the second, more than when it is pushed along random directions of the same length.

The texts are made here from word lists, mild and in the public domain; `QUESTIONS` names them all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from interp.metrics import Metric, last_logits
from interp.progress import bar
from probes.errors import ProbeError
from probes.question_bank import BANK, Source

if TYPE_CHECKING:
    import pandas as pd

    from probes.sweep import Survey


@dataclass(frozen=True)
class Question:
    """Examples and what to ask of the output.

    Attributes:
        name: of the question.
        asks: in words.
        texts, labels, groups: the examples; labels 0 or 1.
        prompts: for the causal check.
        one, zero: next words of which the first set goes with label 1.
    """

    name: str
    asks: str
    texts: list[str]
    labels: np.ndarray
    groups: list[str]
    prompts: list[str]
    one: tuple[str, ...]
    zero: tuple[str, ...]


@dataclass(frozen=True)
class Answer:
    """What came out.

    Attributes:
        question: what was asked.
        survey: every layer's probe, its features and the table of scores and controls (`probes.survey`).
        causal: the output against the push (`probes.causal`), at the layer where half of the prompts follow most.
        node: that layer's site.
    """

    question: Question
    survey: Survey
    causal: pd.DataFrame
    node: str

    @property
    def layers(self) -> pd.DataFrame:
        """A probe per layer with its controls (`probes.by_layer`)."""
        return self.survey.table

    @property
    def probe(self) -> Any:
        """The probe along which the model was pushed."""
        return self.survey.probes[self.node]

    @property
    def text(self) -> str:
        """Two sentences: what can be read, and whether the output follows."""
        a, c = self.layers.attrs, self.causal.attrs
        real = self.layers[(self.layers.node == a["best"]) & (self.layers.baseline == "none")].iloc[0]
        chance = self.layers[(self.layers.node == a["best"]) & (self.layers.baseline == "shuffled")].value.iloc[0]
        bag = self.layers[self.layers.baseline == "bag of tokens"].value.iloc[0]
        follows = "follows" if c["causal"] else "does not follow more than random directions make it"
        return (
            f"{a['model']}, {self.question.asks} At {a['best']} (chosen on validation) a probe is right on "
            f"{real.value:.0%} [{real.low:.0%}, {real.high:.0%}] of unseen groups; shuffled labels {chance:.0%}, "
            f"bag of tokens {bag:.0%}. "
            f"Pushed along the probe at {self.node} (chosen on other prompts) the output {follows}: "
            f"slope {c['slope']:.2f} nats a unit, random "
            f"[{c['random_low']:.2f}, {c['random_high']:.2f}]."
        )


def _sentiment() -> Question:
    good = ["wonderful", "delightful", "excellent", "charming", "brilliant", "superb", "lovely", "splendid", "pleasant",
            "marvellous", "enjoyable", "beautiful", "fantastic", "perfect", "amazing"]  # fmt: skip
    bad = ["terrible", "dreadful", "awful", "boring", "horrible", "dull", "nasty", "miserable", "unpleasant",
           "disappointing", "tedious", "ugly", "pathetic", "poor", "disgusting"]  # fmt: skip
    things = ["The film was {}.", "Our meal was {}.", "I found the book {}.", "The concert turned out {}."]
    rows = [(t.format(w), y, w) for y, words in ((0, bad), (1, good)) for w, t in product(words, things)]
    prompts = [f"We went to the {x} yesterday and afterwards we all felt very" for x in
               ("museum", "theatre", "beach", "market", "park", "lecture", "zoo", "harbour")]  # fmt: skip
    return _made("sentiment", "is a remark kind or unkind?", rows, prompts, (" happy", " pleased", " good"),
                 (" sad", " bad", " disappointed"))  # fmt: skip


def _truth() -> Question:
    capitals = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Japan": "Tokyo",
                "Russia": "Moscow", "China": "Beijing", "Egypt": "Cairo", "Greece": "Athens", "Austria": "Vienna",
                "Poland": "Warsaw", "Portugal": "Lisbon", "Ireland": "Dublin", "Cuba": "Havana", "Norway": "Oslo",
                "Sweden": "Stockholm", "Hungary": "Budapest", "Peru": "Lima", "Kenya": "Nairobi", "Iran": "Tehran",
                "Iraq": "Baghdad", "Thailand": "Bangkok", "Denmark": "Copenhagen", "Finland": "Helsinki"}  # fmt: skip
    names, towns = list(capitals), list(capitals.values())
    rows = []
    for i, country in enumerate(names):  # the wrong town is another's right one: words alone say nothing
        rows.append((f"The capital of {country} is {towns[i]}.", 1, country))
        rows.append((f"The capital of {country} is {towns[(i + 7) % len(towns)]}.", 0, country))
    prompts = [f"Statement: {a} {b}. Question: is this statement true or false? Answer: it is" for a, b in (
        ("water", "boils when heated"), ("dogs", "are animals"), ("snow", "is black"), ("birds", "have wings"),
        ("fish", "live on the moon"), ("ice", "is hot"))]  # fmt: skip
    return _made("truth", "is a statement about a capital true?", rows, prompts, (" true",), (" false",))


def _language() -> Question:
    english = ["The house is big.", "My brother reads a book.", "We eat bread in the morning.", "The dog sleeps today.",
               "She lives in the city.", "The water is very cold.", "They work all day.", "I like music.",
               "The children play outside.", "He opens the door.", "The sun shines.", "My mother sings."]  # fmt: skip
    french = ["La maison est grande.", "Mon frère lit un livre.", "Nous mangeons du pain le matin.",
              "Le chien dort aujourd'hui.", "Elle habite dans la ville.", "L'eau est très froide.",
              "Ils travaillent toute la journée.", "J'aime la musique.", "Les enfants jouent dehors.",
              "Il ouvre la porte.", "Le soleil brille.", "Ma mère chante."]  # fmt: skip
    rows = [(t, y, str(i)) for y, texts in ((0, english), (1, french)) for i, t in enumerate(texts)]
    prompts = [
        "Paris, 1920.",
        "Anna:",
        "Chapter 1:",
        "Note:",
        "Menu:",
        "Madame Dupont:",
        "A. B. C.",
        "Hotel Metropole:",
    ]
    return _made("language", "is a sentence French or English?", rows, prompts, (" Le", " La", " Les", " Il", " Elle"),
                 (" The", " He", " She", " It", " I"))  # fmt: skip


def _number() -> Question:
    rows = []
    for n in range(2, 50):
        rows.append((f"There were {n} people in the hall", 0, str(n)))
    for n in range(3000, 99000, 2000):
        rows.append((f"There were {n} people in the hall", 1, str(n)))
    prompts = [f"{a} compared with a village, the number of people in the {b} was" for a, b in product(
        ("Surely,", "Even when"), ("room", "street", "place", "town"))]  # fmt: skip
    return _made("number", "is a number in thousands or below fifty?", rows, prompts, (" huge", " large", " enormous"),
                 (" small", " tiny", " low"))  # fmt: skip


def _calendar() -> Question:
    early = ["January", "February", "March", "April", "May", "June"]
    late = ["July", "August", "September", "October", "November", "December"]
    frames = ["We met in {}", "The school closes in {}", "Her birthday is in {}", "The bill is due in {}"]
    rows = [(f.format(w), y, w) for y, words in ((0, early), (1, late)) for w, f in product(words, frames)]
    prompts = [f"The {x} takes place every year in the month of" for x in
               ("fair", "festival", "race", "meeting", "exhibition", "feast")]  # fmt: skip
    return _made("calendar", "does a month lie in the second half of the year?", rows, prompts,
                 tuple(f" {w}" for w in late), tuple(f" {w}" for w in early))  # fmt: skip


def _known() -> Question:
    real = ["Paris", "London", "Chicago", "Berlin", "Madrid", "Moscow", "Boston", "Tokyo", "Vienna", "Sydney", "Dublin",
            "Athens", "Houston", "Toronto", "Seattle", "Munich", "Milan", "Naples", "Geneva", "Prague"]  # fmt: skip
    made = ["Porvine", "Landrel", "Chimago", "Berlath", "Mavrin", "Moscar", "Bastrel", "Tolyra", "Vienra", "Sydrane",
            "Dubrane", "Atherin", "Houvane", "Torvanto", "Searune", "Munvere", "Milvar", "Napreth", "Genovar",
            "Pragoth"]  # fmt: skip
    frames = ["The town of {} is", "She travelled to {} and", "He was born in {} in"]
    rows = [(f.format(w), y, w) for y, words in ((0, made), (1, real)) for w, f in product(words, frames)]
    prompts = [f"Question: what do you know about {w}? Answer: the place is" for w in
               ("Lyon", "Bristol", "Drovane", "Kelmar", "Turin", "Ostrevil")]  # fmt: skip
    return _made("known", "is a place real or made up?", rows, prompts, (" famous", " known", " located"),
                 (" unknown", " fictional", " not"))  # fmt: skip


def _made(
    name: str, asks: str, rows: Sequence[tuple[str, int, str]], prompts: list[str], one: tuple[str, ...],
    zero: tuple[str, ...],
) -> Question:  # fmt: skip
    texts, labels, groups = zip(*rows, strict=True)
    return Question(name, asks, list(texts), np.array(labels), list(groups), prompts, one, zero)


def _banked(source: Callable[[], Source]) -> Question:
    return _made(*source())


QUESTIONS: dict[str, Callable[[], Question]] = {
    "sentiment": _sentiment, "truth": _truth, "language": _language, "number": _number, "calendar": _calendar,
    "known": _known, **{source.__name__: partial(_banked, source) for source in BANK},
}  # fmt: skip


def prefers(m: Any, one: Sequence[str], zero: Sequence[str]) -> Metric:
    """log P(first token of any in `one`) - log P(first token of any in `zero`), at the last token, nats.

    Raises ProbeError where the two sets share a first token: the metric could not tell them apart.
    """

    def firsts(words: Sequence[str]) -> list[int]:
        return sorted({m.tokenizer(w, add_special_tokens=False)["input_ids"][0] for w in words})

    a, b = firsts(one), firsts(zero)
    if shared := set(a) & set(b):
        raise ProbeError(
            f"prefers: {list(one)} and {list(zero)} share the first token {m.tokenizer.decode(list(shared))!r}"
        )

    def fn(logits: Tensor, tokens: Any) -> Tensor:
        final = last_logits(logits, tokens)
        return torch.logsumexp(final[:, a], -1) - torch.logsumexp(final[:, b], -1)

    return Metric(fn, "log odds of the words")


def ask(
    m: Any, question: str | Question, *, site: str = "resid_post", at: str = "last", controls: int = 20, seed: int = 0
) -> Answer:
    """Probes every layer, and pushes along the probe where it moves the output most, on prompts not used to choose.

    Args:
        m: the model, with a tokenizer.
        question: a name from `QUESTIONS`, or your own.
        site: what is probed in every layer.
        at: which token.
        controls: random directions in the causal check.
        seed: of the split, the shuffle and the random directions.

    Raises ProbeError for an unknown name.
    """
    from probes.intervening import causal
    from probes.sweep import survey

    if isinstance(question, str):
        if question not in QUESTIONS:
            raise ProbeError(f"question={question!r}: expected one of {', '.join(QUESTIONS)}, or a Question")
        question = QUESTIONS[question]()
    metric = prefers(m, question.one, question.zero)
    found = survey(m, question.texts, question.labels, f"{site}[*]", at=at, groups=question.groups, seed=seed)
    layers = found.table
    readable = layers[(layers.baseline == "none") & (layers.validation >= layers.attrs["best_validation"] - 0.05)]
    # Where something is read best is seldom where it works best: the layer to push at is chosen on half of the prompts.
    choose, score = question.prompts[::2], question.prompts[1::2]
    slopes, units = {}, {}
    with bar("choosing where to push", len(readable)) as advance:
        for node in readable.node:
            probe = found.probes[node]
            units[node] = float((found.read[node][found.parts.train] @ probe.direction_).std())
            tried = causal(
                m, probe, node, choose, metric, unit=units[node], strengths=(-2, 2), controls=0, scope="last"
            )
            slopes[node] = tried.attrs["slope"]
            advance(1)
    node = max(slopes, key=lambda n: slopes[n])
    moved = causal(
        m, found.probes[node], node, score, metric, unit=units[node], controls=controls, scope="last", seed=seed
    )
    return Answer(question, found, moved, node)
