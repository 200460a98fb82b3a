"""Encyclopaedia articles: from a MediaWiki dump to plain text."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator
from xml.etree import ElementTree

_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_REFERENCE = re.compile(r"<ref\b[^>]*/>|<ref\b[^>]*>.*?</ref\s*>", re.DOTALL | re.IGNORECASE)
_BLOCK = re.compile(
    r"<(math|gallery|table|timeline|source|syntaxhighlight|score|imagemap|div|code|pre)\b[^>]*>.*?</\1\s*>",
    re.DOTALL | re.IGNORECASE,
)
_INNERMOST = re.compile(r"\{\{[^{}]*\}\}|\{\|(?:(?!\{\|).)*?\|\}", re.DOTALL)
_MEDIA = re.compile(
    r"\[\[\s*(?:File|Image|Category|Media|[a-z]{2,3}(?:-[a-z]+)?)\s*:(?:[^\[\]]|\[\[[^\[\]]*\]\])*\]\]", re.IGNORECASE
)
_LINK = re.compile(r"\[\[(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]")
_ADDRESS = re.compile(r"\[(?:https?|ftp)?:?//[^\s\]]+\s*([^\]]*)\]")
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_HEADING = re.compile(r"^=+\s*(.*?)\s*=+\s*$", re.MULTILINE)
_BACK_MATTER = re.compile(
    r"^==\s*(?:References|External links|See also|Further reading|Notes|Footnotes|Bibliography|Sources|Gallery)\b.*\Z",
    re.MULTILINE | re.DOTALL | re.IGNORECASE,
)
_LIST = re.compile(r"^[*#:;]+\s*", re.MULTILINE)
_LEFTOVER = re.compile(r"^\s*[|!{}].*$|^\s*__[A-Z]+__\s*$|\{\{|\}\}", re.MULTILINE)


def articles(dump: bytes) -> Iterator[tuple[str, str]]:
    """(title, markup) of every encyclopaedia article in a dump; redirects and other namespaces are skipped.

    A dump that was cut off in the middle is read as far as it goes.
    """
    events = ElementTree.iterparse(io.BytesIO(dump))
    while True:
        try:
            _, element = next(events)
        except (StopIteration, ElementTree.ParseError):
            return
        if element.tag.rpartition("}")[2] != "page":
            continue
        fields = {e.tag.rpartition("}")[2]: e.text or "" for e in element.iter()}
        markup = fields.get("text", "")
        if fields.get("ns", "0") == "0" and not markup.lstrip().lower().startswith("#redirect"):
            yield fields.get("title", ""), markup
        element.clear()


def plain(markup: str) -> str:
    """The article's words: no templates, tables, references, media, link targets, lists of literature.

    >>> plain("'''Law''' is {{x|{{y}}}}a [[system]] of [[Rule|rules]].<ref>no</ref>\\n== History ==\\nOld.")
    'Law is a system of rules.\\n\\nHistory\\n\\nOld.'
    """
    text = _BACK_MATTER.sub("", _COMMENT.sub("", markup))
    text = _BLOCK.sub("", _REFERENCE.sub("", text))
    for _ in range(12):  # templates and tables nest; each pass takes the innermost layer
        text, taken = _INNERMOST.subn("", text)
        if not taken:
            break
    text = _LINK.sub(r"\1", _MEDIA.sub("", text))
    text = _ADDRESS.sub(r"\1", _LINK.sub(r"\1", text))
    text = html.unescape(_TAG.sub("", text))
    text = _HEADING.sub(r"\n\1\n", text)
    text = _LEFTOVER.sub("", _LIST.sub("", text.replace("'''", "").replace("''", "")))
    text = re.sub(r"\(\s*[;,]?\s*\)", "", text)  # brackets that held only a template
    blocks = (" ".join(block.split()) for block in text.split("\n"))
    return "\n\n".join(block for block in blocks if block)
