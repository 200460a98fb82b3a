# ruff: noqa: RUF001  # the glyphs are meant
"""Manual pages: from roff with the `man` macros to plain text.

Only the text is wanted, so this is no typesetter: comments, fonts and requests go, filled lines are joined to one line
per paragraph, examples between `.nf` and `.fi` keep their lines. Pages in the older `mdoc` language are refused, since
their macros carry the words. The rare unbreakable space `\\~` vanishes (some 400 times in the nine packages of the
corpus): models have been trained on the text as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_FONT = re.compile(r"\\f(?:\[[^]]*\]|\([^\s]{2}|.)")
_SIZE = re.compile(r"\\s(?:\[[^]]*\]|[-+]?\d{1,2})")
_ARGUMENT = re.compile(r"\\[hvwlLDXZoxAbBCNRSH]'[^']*'")
_STRING = re.compile(r"\\\*(?:\[([^]]*)\]|\((..)|(.))")
_GLYPH = re.compile(r"\\(?:\[([^]]*)\]|\((..))")
_OTHER = re.compile(r"\\[&/,|^%:{}~!cdtup]|\\[nkmM](?:\[[^]]*\]|\(..|.)|\\$")
_WORD = re.compile(r'"((?:[^"]|"")*)"?|(\S+)')

_GLYPHS = {
    "aq": "'", "cq": "’", "oq": "‘", "lq": "“", "rq": "”", "dq": '"', "ga": "`", "ha": "^", "ti": "~", "bu": "*",
    "bul": "*", "em": "—", "en": "–", "hy": "-", "mi": "-", "co": "©", "rg": "®", "tm": "™", "mu": "×", "pl": "+",
    "eq": "=", "==": "≡", "!=": "≠", "<=": "≤", ">=": "≥", "->": "→", "<-": "←", "fo": "‹", "fc": "›", "Fo": "«",
    "Fc": "»", "rs": "\\", "sl": "/", "ba": "|", "br": "|", "ul": "_", "at": "@", "sh": "#", "Do": "$", "Eu": "€",
    "de": "°", "sc": "§", "ss": "ß", "12": "½", "14": "¼", "34": "¾", "la": "<", "ra": ">", "lB": "[", "rB": "]",
    "lC": "{", "rC": "}", "if": "∞", "*a": "α", "*b": "β", "*p": "π", "*m": "μ", "mc": "µ", "sr": "√", "no": "¬",
    "+-": "±", "pc": "·", "di": "÷", "'e": "é", "`e": "è", ":o": "ö", ":a": "ä", ":u": "ü", "'a": "á", "'o": "ó",
}  # fmt: skip
_STRINGS = {"lq": "“", "rq": "”", "R": "®", "Tm": "™", "aq": "'"}

#: Requests whose lines up to an end mark are no text: definitions of macros, and tables.
_SKIPPED = {"de": "..", "de1": "..", "am": "..", "ig": "..", "TS": ".TE"}
_FONTS = {"B", "I", "R", "SM", "SB"}
_ALTERNATING = {"BR", "RB", "BI", "IB", "IR", "RI"}
_BREAKS = {"PP", "P", "LP", "HP", "TP", "TQ", "IP", "RS", "RE", "sp", "bp"}
_EXAMPLES = {"nf": False, "EX": False, "fi": True, "EE": True}


def is_mdoc(source: str) -> bool:
    """Whether the page is not written with the `man` macros (`.SH`) but with mdoc (`.Sh`), or only names another."""
    return (
        re.search(r"^\.SH\b", source, re.MULTILINE) is None or re.search(r"^\.Sh\b", source, re.MULTILINE) is not None
    )


def sections(source: str) -> list[tuple[str, str]]:
    """(heading, text) of every `.SH` section, in order; what stands before the first one is dropped.

    >>> sections('.TH X 1\\n.SH NAME\\nls \\\\- list\\n.B all\\nfiles\\n.PP\\nMore.')
    [('NAME', 'ls - list all files\\n\\nMore.')]
    """
    page: list[_Section] = []
    lines = iter(source.replace("\\\n", "").split("\n"))
    for line in lines:
        if not line.startswith((".", "'")):
            if page:
                page[-1].line(line)
            continue
        name, _, rest = line[1:].strip().partition(" ")
        if name in _SKIPPED:
            _skip(lines, _SKIPPED[name])
        elif name == "SH":
            page.append(_Section(_plain(" ".join(_words(rest)))))
        elif page:
            page[-1].request(name, rest)
    return [(section.heading, section.text()) for section in page]


class _Section:
    """A section while it is read: its paragraphs so far, and whether lines are filled or kept (an example)."""

    def __init__(self, heading: str) -> None:
        self.heading = heading
        self.filled = True
        self.blocks = [""]

    def line(self, line: str) -> None:
        """A line of text: the heading if `.SH` had none; a blank one ends a paragraph."""
        if not self.heading:
            self.heading = _plain(line) if line.strip() else ""
        elif line.strip():
            self.add(_plain(line))
        elif self.filled:
            self.blocks.append("")
        else:
            self.add("")

    def request(self, name: str, rest: str) -> None:
        """A macro inside the section; those that carry no text are passed over."""
        if name == "SS":
            self.filled = True
            self.blocks += [_plain(" ".join(_words(rest))), ""]
        elif name in _EXAMPLES:
            self.filled = _EXAMPLES[name]
            self.blocks.append("")
        elif name in _BREAKS:
            self.blocks.append("")
            if name == "IP" and (words := _words(rest)):
                self.add(_plain(words[0]))
        elif name in _FONTS:
            self.add(_plain(" ".join(_words(rest))))
        elif name in _ALTERNATING:
            self.add(_plain("".join(_words(rest))))
        elif name in {"UE", "ME"} and rest.strip():  # what follows a link without a space
            self.blocks[-1] += _plain(rest.strip())
        elif name == "SY":
            self.add(_plain(rest))
        elif name == "OP":
            self.add("[" + _plain(" ".join(_words(rest))) + "]")

    def add(self, text: str) -> None:
        """One more piece of the current paragraph: on its own line in an example, after a space elsewhere."""
        if not self.filled:
            self.blocks[-1] += ("\n" if self.blocks[-1] else "") + text
        elif text.strip():
            self.blocks[-1] += (" " if self.blocks[-1] else "") + text.strip()

    def text(self) -> str:
        """The paragraphs, a blank line between them."""
        return "\n\n".join(block.strip("\n") for block in self.blocks if block.strip())


def _skip(lines: Iterator[str], end: str) -> None:
    for line in lines:
        if line.startswith(end):
            return


def _words(rest: str) -> list[str]:
    """The arguments of a request; quotes group words and double inside."""
    rest = re.sub(r'\s*\\".*$', "", rest)
    return [(quoted.replace('""', '"') if bare == "" else bare) for quoted, bare in _WORD.findall(rest)]


def _plain(text: str) -> str:
    """Escapes resolved or removed."""
    if "\\" not in text:
        return text
    text = re.sub(r'\\["#].*$', "", text)
    text = _FONT.sub("", text)
    text = _SIZE.sub("", text)
    text = _ARGUMENT.sub("", text)
    text = _STRING.sub(lambda m: _STRINGS.get(m[1] or m[2] or m[3] or "", ""), text)
    text = _GLYPH.sub(lambda m: _GLYPHS.get(m[1] or m[2] or "", ""), text)
    text = text.replace("\\-", "-").replace("\\ ", " ").replace("\\0", " ").replace("\\'", "'").replace("\\`", "`")
    text = text.replace("\\.", ".").replace("\\e", "\x00").replace("\\\\", "\x00")
    return _OTHER.sub("", text).replace("\x00", "\\")
