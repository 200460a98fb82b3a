"""The same pages in several languages: the GNOME user documentation.

A translation has the XML tree of its original, so the n-th paragraph of a page is the n-th paragraph of its
translation. That is a test bed for language experts: the content is held fixed, only the language changes.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from interp.corpora.archive import members
from interp.corpora.documents import Document, tidy

LANGUAGES = ("en", "de", "es", "fr", "pl", "ru")
_PAGE = re.compile(r"usr/share/help/([^/]+)/(gnome-help|system-admin-guide)/([^/]+)\.page$")
_SKIPPED = {"info", "credit", "media", "code", "screen"}


def parallel(package: Path, source: str) -> Iterator[tuple[str, Document]]:
    """(language, document) of every page that is translated into all LANGUAGES.

    Only the paragraphs that all of them have translated are kept, so paragraph i of a page (blocks between
    blank lines) says the same in each language.
    """
    pages: defaultdict[str, dict[str, list[str]]] = defaultdict(dict)

    def wanted(name: str) -> bool:
        match = _PAGE.match(name)
        return match is not None and (match[1] == "C" or match[1] in LANGUAGES)

    for name, data in members(package, wanted):
        match = _PAGE.match(name)
        assert match is not None, "wanted() matched"
        pages[f"{match[2]}/{match[3]}"]["en" if match[1] == "C" else match[1]] = page_paragraphs(data)
    for page in sorted(pages):
        versions = pages[page]
        if set(versions) != set(LANGUAGES) or len({len(v) for v in versions.values()}) != 1:
            continue  # a translation of another release: its paragraphs cannot be matched
        rows = [row for row in zip(*(versions[x] for x in LANGUAGES), strict=True) if _all_translated(row)]
        for column, language in enumerate(LANGUAGES):
            if rows:
                text = tidy("\n\n".join(row[column] for row in rows))
                yield language, Document(f"{source}:{page}", text, page, source)


def page_paragraphs(data: bytes) -> list[str]:
    """The text of the titles and `<p>` of a Mallard page, in document order; its head and pictures are skipped."""
    found: list[str] = []

    def walk(element: ElementTree.Element) -> None:
        tag = element.tag.rpartition("}")[2] if isinstance(element.tag, str) else "info"
        if tag in {"p", "title"}:
            found.append(" ".join("".join(element.itertext()).split()))
        elif tag not in _SKIPPED:
            for child in element:
                walk(child)

    walk(ElementTree.fromstring(data))
    return found


def _all_translated(row: tuple[str, ...]) -> bool:
    return all(row) and len(set(row)) == len(row) and len(row[0].split()) >= 4
