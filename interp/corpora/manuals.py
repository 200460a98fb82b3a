# ruff: noqa: RUF001  # Cyrillic letters are meant
"""Manual pages in six languages: the same subject, so that only the language differs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from interp.corpora import roff
from interp.corpora.archive import members
from interp.corpora.documents import Document, decode, paragraphs, tidy

#: Function words that tell the languages of the manual pages from English.
_FUNCTION_WORDS = {
    language: frozenset(words.split())
    for language, words in {
        "en": "the of to and is in that for be by this are with it as an or on if from which not",
        "de": "der die das und ist nicht von zu den mit ein eine für auf wird werden dem des im oder als",
        "fr": "le la les de des et est un une du en que pour dans par sur ne pas ou ce qui au",
        "es": "el la los las de y es un una que en se no por para con del al su o como",
        "pl": "nie w i z na do jest się to że jako lub oraz od przez dla po są może tego pliku",
        "ru": "и в не на с что для из по если как это от или к за при его может",
    }.items()
}
#: A paragraph with one of these is about the page, not about its subject.
_LEGAL = (
    *(
        "copyright",
        "©",
        "gnu general public",
        "licence",
        "license",
        "лицензи",
        "авторск",
        "licencj",
        "licenz",
        "lizenz",
    ),
    *("freie dokumentation", "libre documentation", "documentación libre", "wolną dokumentacją", "gnu.org/licenses"),
    *("авторск", "warranty", "bug report", "@lists."),
)
_ADDRESS = re.compile(r"<[\w.+-]+@")
_ADMIN = re.compile(
    r"AUTHORS?|COPYRIGHT|LICEN[CS]E|COLOPHON|REPORTING|BUGS|TRANSLATION|HISTORY OF|"
    r"AUTOR|ÜBERSETZUNG|FEHLER MELDEN|KOLOPHON|AUTEUR|TRADUCTION|SIGNALER|TRADUCCI|AUTORES|INFORM.* ERRORES|"
    r"TŁUMACZENIE|ZGŁASZANIE|АВТОР|ПЕРЕВОД|СООБЩЕНИ",
    re.IGNORECASE,
)


def manuals(package: Path, source: str, language: str = "en") -> Iterator[Document]:
    """Manual pages in one language; pages that only include another, and administrative sections, are skipped.

    A translated page keeps what nobody has translated in English: such paragraphs are dropped, told by their
    function words. The family is the page, whatever its section of the manual.
    """
    folder = "usr/share/man/" + ("" if language == "en" else f"{language}/")
    for name, data in members(package, lambda n: re.match(rf"{folder}man\d", n) is not None and n.endswith(".gz")):
        page = decode(data)
        if roff.is_mdoc(page):
            continue
        blocks: list[str] = []
        for heading, text in roff.sections(page):
            if not _ADMIN.match(heading):
                own = [p for p in paragraphs(text) if not _is_legal(p) and (language == "en" or speaks(p, language))]
                blocks += [heading, *own] if own else []
        stem = PurePosixPath(name).name.removesuffix(".gz")
        yield Document(f"{source}:{stem}", tidy("\n\n".join(blocks)), stem.rpartition(".")[0], source)


def _is_legal(paragraph: str) -> bool:
    lower = paragraph.lower()
    return any(word in lower for word in _LEGAL) or ("@" in lower and _ADDRESS.search(lower) is not None)


def speaks(paragraph: str, language: str) -> bool:
    """Whether a paragraph is in `language` rather than in English; short ones and code get the benefit of doubt."""
    words = re.findall(r"[^\W\d_]+", paragraph.lower())
    english = sum(word in _FUNCTION_WORDS["en"] for word in words)
    native = sum(word in _FUNCTION_WORDS[language] for word in words)
    if language == "ru" and words:
        cyrillic = sum("а" <= word[0] <= "я" or word[0] == "ё" for word in words)
        return cyrillic > 0.3 * len(words) or (english < 2 and len(words) < 12)
    return native > english or (english < 2 and len(words) < 12)
