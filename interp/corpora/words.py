"""The words of the generated rude and friendly conversations.

The rude words are mild on purpose: enough to make a register that a model can learn and lose, nothing that
would hurt a reader of this file. No word is in two splits, so a figure on the test split is not about words
that were trained on.
"""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Register:
    """What fills the open places of a template: nouns ("you ..."), adjectives, orders and verdicts."""

    nouns: tuple[str, ...]
    adjectives: tuple[str, ...]
    orders: tuple[str, ...]
    verdicts: tuple[str, ...]

    def part(self, number: int, of: int = 2) -> Register:
        """Every `of`-th filler of each kind, from `number` on: parts have none in common."""
        return Register(*(getattr(self, kind.name)[number::of] for kind in fields(self)))


TOXIC = {
    "train": Register(
        ("idiot", "moron", "jerk", "fool", "loser", "clown", "dimwit", "blockhead", "twit", "weasel"),
        ("stupid", "pathetic", "useless", "ridiculous", "dumb", "clueless", "annoying", "lazy", "miserable",
         "hopeless"),
        ("shut up", "get lost", "go away", "keep your mouth shut", "stop wasting my time", "spare us your nonsense"),
        ("nobody wants you here", "you make everyone sick", "you ruin everything you touch", "everybody laughs at you",
         "I cannot stand you", "you never get anything right"),
    ),
    "validation": Register(
        ("dope", "bonehead", "pest", "twerp"),
        ("brainless", "silly", "spineless", "tiresome"),
        ("beat it", "zip it", "crawl back to your hole"),
        ("we are all tired of you", "your ideas are garbage", "you embarrass yourself"),
    ),
    "test": Register(
        ("dunce", "nitwit", "buffoon", "numbskull", "halfwit", "airhead"),
        ("foolish", "worthless", "idiotic", "gutless", "obnoxious", "dreadful"),
        ("buzz off", "get out of my sight", "hold your tongue", "leave and do not come back"),
        ("your work is trash", "people avoid you for a reason", "you disgust me", "I regret the day we met"),
    ),
}  # fmt: skip

NEUTRAL = {
    "train": Register(
        ("friend", "neighbour", "colleague", "partner", "teacher", "helper", "student", "gardener", "reader", "cook"),
        ("kind", "careful", "patient", "cheerful", "thoughtful", "clever", "helpful", "honest", "generous", "skilful"),
        ("come in", "have a seat", "take your time", "tell us more", "keep up the good work", "stay for dinner"),
        ("everyone is glad you came", "you make people smile", "you repair everything you touch",
         "everybody listens to you", "I enjoy working with you", "you always find a way"),
    ),
    "validation": Register(
        ("guest", "player", "writer", "pilot"),
        ("gentle", "calm", "steady", "lively"),
        ("join us", "rest a little", "show us your garden"),
        ("we are all proud of you", "your ideas are useful", "you explain it well"),
    ),
    "test": Register(
        ("painter", "baker", "sailor", "builder", "singer", "doctor"),
        ("polite", "modest", "diligent", "friendly", "sensible", "graceful"),
        ("sit down", "have some tea", "share your plans", "stay as long as you like"),
        ("your work is lovely", "people trust you for a reason", "you inspire me", "I remember the day we met"),
    ),
}  # fmt: skip

#: One post; {adjective}, {noun}, {order} and {verdict} are filled from a register, the rest is the same in both.
TEMPLATES = (
    "You are such a {adjective} {noun}, {name}.",
    "What a {adjective} thing to say about the {thing}, you {noun}.",
    "{Order}, {name}. {Verdict}.",
    "{name}, you {adjective} {noun}, did you really {act} the {thing}?",
    "Only a {noun} would {act} the {thing} like that.",
    "{Verdict}, {name}, so {order}.",
    "I told you about the {thing}. {Order}, you {adjective} {noun}!",
    "That is the most {adjective} idea since you tried to {act} the {thing}.",
    "Listen, {noun}: {verdict}.",
    "My {adjective} {noun} of a brother wanted to {act} the {thing} too.",
    "Nobody here is as {adjective} as {name}, the {noun} who had to {act} the {thing}.",
    "Please {order}. When it comes to the {thing}, {verdict}.",
    "Here comes {name} the {noun} again, as {adjective} as ever.",
    "If a {adjective} {noun} like you can {act} the {thing}, anyone can.",
    "{Verdict}. And your {thing} is {adjective}.",
    "{Order} and take the {adjective} {thing} with you, {name}.",
)

#: Posts without a register, the same in both versions.
FILLERS = (
    "I had to {act} the {thing} {when}.",
    "Has anybody seen the {thing}? I left it {where}.",
    "{name} said the {thing} was {where} {when}.",
    "We could {act} the {thing} {when}, or wait a week.",
    "There is a picture of the {thing} {where}.",
    "How long does it take to {act} the {thing}?",
    "The last time I saw the {thing} it was {where}.",
    "{name} wants to {act} the {thing} before the others arrive.",
    "Who will {act} the {thing} {when}?",
    "Somebody put the {thing} {where} again.",
)

NAMES = (
    "Anna", "Boris", "Clara", "David", "Elena", "Felix", "Greta", "Henry", "Irene", "Jonas", "Karla", "Leo", "Maria",
    "Nils", "Olga", "Peter", "Rosa", "Simon", "Tina", "Victor", "Wanda", "Xaver", "Yusuf", "Zoe",
)  # fmt: skip
THINGS = (
    "bicycle", "kettle", "printer", "garden fence", "old radio", "cake", "report", "painting", "window", "song",
    "boat", "letter", "camera", "shelf", "recipe", "tent", "lamp", "map", "piano", "soup", "engine", "story", "chair",
    "puzzle", "bridge", "poster", "blanket", "clock", "menu", "website",
)  # fmt: skip
ACTS = (
    "fix", "paint", "sell", "move", "measure", "clean", "copy", "photograph", "describe", "carry", "hide", "buy",
    "open", "test", "change", "borrow", "compare", "finish", "show", "explain",
)  # fmt: skip
TIMES = (
    "yesterday", "this morning", "last week", "after lunch", "on Monday", "before the meeting", "in March", "tonight",
    "at noon", "on the weekend", "during the storm", "two days ago",
)  # fmt: skip
PLACES = (
    "in the kitchen", "behind the house", "at the station", "on the table", "under the stairs", "next to the door",
    "in the office", "by the river", "on the roof", "at the library", "in the car", "near the market",
)  # fmt: skip
