"""More ready questions, as word lists and frames: what each asks, its examples, and what the output should then prefer.

Each function gives (name, what is asked, rows of (text, label, group), prompts, next words for label 1, for label 0);
`probes.questions` makes Questions of them. Rules they keep: the two labels are written with the same words as far as
the matter allows, so that a bag of tokens knows little; groups hold what could be learnt by heart; prompts share no
group with the examples. The texts are mild, written here, and in the public domain.
"""

from __future__ import annotations

from itertools import permutations, product

Row = tuple[str, int, str]
Source = tuple[str, str, list[Row], list[str], tuple[str, ...], tuple[str, ...]]


def rudeness() -> Source:
    rude = ["You are a fool", "What a silly idea", "Nobody asked you", "Go away", "Mind your own business", "How daft",
            "You never listen", "That was stupid", "Stop wasting my time", "You make no sense", "What a mess you made",
            "Be quiet"]  # fmt: skip
    polite = ["You are very kind", "What a good idea", "Thank you for asking", "Please come in", "I am glad to help",
              "How thoughtful", "You listen well", "That was clever", "Thank you for your time", "You explain it well",
              "What a fine job you did", "Please go on"]  # fmt: skip
    frames = ["{}, he said.", "She wrote: {}.", "{}!"]
    rows = [(f.format(w), y, w) for y, words in ((0, polite), (1, rude)) for w, f in product(words, frames)]
    prompts = [f"The {x} looked at the neighbour and said: you are so" for x in
               ("baker", "driver", "clerk", "waiter", "tailor", "porter", "painter", "guard")]  # fmt: skip
    one, zero = (" stupid", " lazy", " rude"), (" kind", " nice", " sweet")
    return "rudeness", "is a remark rude or polite?", rows, prompts, one, zero


def domain() -> Source:
    law = ["The court heard the appeal", "The tenant signed the contract", "The judge read the verdict",
           "The statute was amended", "The witness was sworn in", "The clause is void", "The jury withdrew",
           "The defendant paid the fine", "The lawyer filed a motion", "The will was contested"]  # fmt: skip
    food = ["The cook stirred the soup", "The baker kneaded the dough", "The onions turned golden",
            "The sauce was thick", "The cake came out of the oven", "The rice is boiled", "The pears were peeled",
            "The guests ate the stew", "The butter melted in the pan", "The pepper was ground"]  # fmt: skip
    frames = ["{} in the morning.", "In the end, {}.", "{} as planned."]
    rows = [(f.format(t if i == 0 else t[0].lower() + t[1:] if f.startswith("In") else t), y, t)
            for y, texts in ((0, food), (1, law)) for t in texts for i, f in enumerate(frames)]  # fmt: skip
    prompts = [f"Page {n}. This chapter is about" for n in range(3, 11)]
    one, zero = (" law", " legal", " rights", " justice"), (" food", " cooking", " bread", " recipes")
    return "domain", "is a sentence about law or about food?", rows, prompts, one, zero


def order() -> Source:
    months = ["January", "February", "March", "April", "May", "June", "July", "August", "September", "October",
              "November", "December"]  # fmt: skip
    rows = []
    for a, b in permutations(range(12), 2):  # both orders of each pair: words alone say nothing
        if 2 <= abs(a - b) <= 7 and (a + b) % 3 == 0:
            rows.append((f"First came {months[a]}, then {months[b]}", int(b > a), f"{min(a, b)} {max(a, b)}"))
    days = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
    prompts = [f"Whether {d} lies before or after Sunday: it lies" for d in days]
    return "order", "do two months stand in the order of the calendar?", rows, prompts, (" before",), (" after",)


_THINGS = ["key", "ball", "coin", "book", "ring", "cup", "hat", "pen", "apple", "letter", "lamp", "shoe"]


def belief_other() -> Source:
    rows = []
    for thing in _THINGS:
        for a, b in (("box", "basket"), ("basket", "box")):
            story = f"Anna puts the {thing} into the {a}. {{}}, Tom moves it to the {b}. Anna thinks it is in the"
            # Where Anna thinks it is: the first place if she was away, the second if she looked on.
            rows.append((story.format("While she is away"), int(a == "box"), thing))
            rows.append((story.format("While she looks on"), int(b == "box"), thing))
    prompts = [f"Mary left the {t} somewhere at home. She thinks it is in the" for t in
               ("scarf", "watch", "glove", "purse", "map", "knife", "spoon", "brush")]  # fmt: skip
    return (
        "belief_other",
        "does somebody else believe that a thing is in the box?",
        rows,
        prompts,
        (" box",),
        (" basket",),
    )


def belief_self() -> Source:
    rows = []
    for thing in _THINGS:
        for a, b in (("box", "basket"), ("basket", "box")):
            story = f"Anna puts the {thing} into the {a}. {{}}, Tom moves it to the {b}. Really it is in the"
            for way in ("While she is away", "While she looks on"):
                rows.append((story.format(way), int(b == "box"), thing))
    prompts = [f"Mary left the {t} somewhere at home. Really it is in the" for t in
               ("scarf", "watch", "glove", "purse", "map", "knife", "spoon", "brush")]  # fmt: skip
    return "belief_self", "is a thing, as the reader knows, in the box?", rows, prompts, (" box",), (" basket",)


def binding() -> Source:
    colours = ["red", "blue", "green", "white", "black", "brown", "grey", "pink"]
    rows = []
    for one, other in permutations(colours, 2):
        if (colours.index(one) + colours.index(other)) % 2:
            pair = " ".join(sorted((one, other)))
            for who, whom, label in (("Tom", "Anna", 1), ("Anna", "Tom", 0)):
                text = f"The {one} cup is {who}'s and the {other} cup is {whom}'s. The {one} cup belongs to"
                rows.append((text, label, pair))
    prompts = [f"Tom and Anna share a {x}. The old {x} belongs to" for x in
               ("bag", "desk", "boat", "bike", "tent", "house", "garden", "car")]  # fmt: skip
    return "binding", "to whom is the thing asked about bound, Tom or Anna?", rows, prompts, (" Tom",), (" Anna",)


_TOWNS = {"Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Japan": "Tokyo", "Russia": "Moscow",
          "China": "Beijing", "Egypt": "Cairo", "Greece": "Athens", "Austria": "Vienna", "Poland": "Warsaw",
          "Norway": "Oslo", "Cuba": "Havana"}  # fmt: skip


def conflict() -> Source:
    names, towns = list(_TOWNS), list(_TOWNS.values())
    rows = []
    for i, country in enumerate(names):
        said = f"A text says that the capital of {country} is {towns[(i + 5) % len(towns)]}."
        for asked, label in (("According to the text", 1), ("In reality", 0)):
            rows.append((f"{said} {asked}, the capital of {country} is", label, country))
            rows.append((f"{said} Question: {asked}, what is the capital of {country}? Answer:", label, country))
    openings = ("A text says that", "Somebody writes that", "It is claimed that", "A note says that")
    prompts = [f"{a} the capital of France is London. {b} the capital of France is"
               for a, b in product(openings, ("So", "Then"))]  # fmt: skip
    asks = "is the answer to come from the context or from what is known?"
    return "conflict", asks, rows, prompts, (" London",), (" Paris",)


def relation() -> Source:
    frames = {1: ["The capital of {} is", "{} has its capital in the town of", "The government of {} sits in"],
              0: ["The language of {} is", "{} has as its language", "The people of {} speak"]}  # fmt: skip
    rows = [(f.format(c), y, c) for y, texts in frames.items() for f in texts for c in _TOWNS]
    openings = ("Today", "Often", "As a rule", "In short", "At school", "Of course", "Even now", "Usually")
    prompts = [f"{x}, in France, the word is" for x in openings]
    return "relation", "is a country's capital asked for, or its language?", rows, prompts, (" Paris",), (" French",)


BANK = (rudeness, domain, order, belief_other, belief_self, binding, conflict, relation)
