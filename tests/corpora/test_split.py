from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interp.corpora.documents import Document, rank, tidy
from interp.corpora.novelty import Novelty
from interp.corpora.split import Limits, size, split_documents

WORDS = [f"w{i}" for i in range(2000)]


def essay(key: object, words: int = 300) -> str:
    draw = random.Random(str(key))
    return "\n\n".join(" ".join(draw.choices(WORDS, k=30)) for _ in range(words // 30))


def library(count: int = 200) -> list[Document]:
    return [Document(f"s:{i}", essay(i), f"family {i // 2}", "s") for i in range(count)]


LIMITS = Limits(train=80_000, share=0.1, floor=5_000, cap=15_000)


def split(documents, **options):
    return list(split_documents(documents, limits=LIMITS, **options))


def test_families_stay_together_and_splits_are_disjoint():
    found = split(library())
    where: dict[str, set[str]] = {}
    for name, document in found:
        where.setdefault(document.family, set()).add(name)
    assert all(len(names) == 1 for names in where.values())
    assert {name for name, _ in found} == {"train", "validation", "test"}


def test_sizes():
    found = split(library())
    bytes_ = {s: sum(size(d.text) for name, d in found if name == s) for s in ("train", "validation", "test")}
    held_out = 0.1 * LIMITS.train / 0.8
    biggest = 2 * max(size(d.text) for d in library())  # a family is put in whole
    for name in ("validation", "test"):
        assert held_out <= bytes_[name] <= held_out + biggest
    assert LIMITS.train <= bytes_["train"] <= LIMITS.train + biggest


def test_the_order_of_the_files_does_not_matter():
    documents = library(60)
    shuffled = documents.copy()
    random.Random(1).shuffle(shuffled)
    assert split(documents) == split(shuffled)
    assert split(documents) == split(documents)


def test_small_labels_still_have_held_out_text():
    found = split(library(30))
    assert sum(size(d.text) for name, d in found if name == "test") >= LIMITS.floor


def test_a_family_bigger_than_a_held_out_split_goes_to_train():
    big = [Document(f"s:big{i}", essay(f"big{i}", 900), "big", "s") for i in range(20)]
    names = {name for name, document in split(library(40) + big) if document.family == "big"}
    assert names == {"train"}


def test_nothing_is_said_twice():
    """A paragraph of one document that comes again in another, as it is or slightly changed, is dropped there."""
    documents = library(60)
    shared = " ".join(random.Random(7).choices(WORDS, k=60))
    changed = shared.replace(shared.split()[30], "other", 1)
    spoiled = [
        Document(d.id, f"{d.text}\n\n{changed if i % 2 else shared}", d.family, d.source)
        for i, d in enumerate(documents)
    ]
    texts = [document.text for _, document in split(spoiled)]
    marker = " ".join(shared.split()[:20])
    assert sum(marker in text for text in texts) == 1


def test_whole_documents_in_code():
    documents = library(20)
    copies = [Document(d.id + "copy", "  " + d.text.replace("\n\n", "\n\n "), d.family + "c", "s") for d in documents]
    found = split(documents + copies, by_paragraph=False)
    assert len(found) == 20


def test_headings_may_come_again_but_not_alone():
    text = "NAME\n\n" + essay("x", 60)
    documents = [Document("a", text, "a", "s"), Document("b", "NAME\n\n" + essay("y", 60), "b", "s")]
    documents.append(Document("c", "NAME\n\nSEE ALSO\n\nNOTES", "c", "s"))
    found = {d.id: d.text for _, d in split(documents, shortest=5)}
    assert set(found) == {"a", "b"}
    assert all(text.startswith("NAME") for text in found.values())


@settings(deadline=None, max_examples=50)
@given(st.text(alphabet="abc \n\t\r\x00é\u0301\u200b", max_size=80))
def test_tidy_settles(text):
    once = tidy(text)
    assert tidy(once) == once
    assert "\r" not in once
    assert "\n\n\n" not in once


def test_tidy_keeps_indentation():
    assert tidy("def f():\r\n\treturn 1  \n\n\n\n    x") == "def f():\n\treturn 1\n\n    x"


def test_novelty_near_duplicates():
    seen = Novelty()
    words = random.Random(3).choices(WORDS, k=400)
    assert seen.is_new(" ".join(words))
    assert not seen.is_new("\n".join(words))  # white space does not count
    assert not seen.is_new(" ".join(words[:300]).upper())  # part of what was said
    assert seen.is_new(" ".join(words[:100] + random.Random(4).choices(WORDS, k=300)))  # mostly new


def test_novelty_agrees_with_a_literal_count():
    """The sketch estimates the share of known 5-grams; held against the count over all of them."""
    seen = Novelty()
    first = random.Random(5).choices(WORDS, k=3000)
    seen.is_new(" ".join(first))
    for known in (0.2, 0.35, 0.65, 0.8):
        cut = int(known * 2000)
        words = first[:cut] + random.Random(known).choices(WORDS, k=2000 - cut)
        grams = list(zip(*(words[i:] for i in range(5)), strict=False))
        old = set(zip(*(first[i:] for i in range(5)), strict=False))
        share = sum(g in old for g in grams) / len(grams)
        assert share == pytest.approx(known, abs=0.01)
        assert Novelty.is_new(_copy(seen), " ".join(words)) == (share <= 0.5)


def _copy(seen: Novelty) -> Novelty:
    other = Novelty()
    other._exact, other._shingles = set(seen._exact), set(seen._shingles)
    return other


def test_ranks_are_uniform_and_fixed():
    ranks = sorted(rank(str(i)) for i in range(1000))
    assert all(abs(r - i / 1000) < 0.06 for i, r in enumerate(ranks))
