# ruff: noqa: RUF001  # the glyphs are meant
"""Manual pages: from roff with the `man` macros to plain text.

Only the text is wanted, so this is no typesetter: comments, fonts and requests go, filled lines are joined to
one line per paragraph, examples between `.nf` and `.fi` keep their lines. Pages in the older `mdoc` language
are refused, since their macros carry the words. The rare unbreakable space `\\~` vanishes (some 400 times in the nine
packages of the corpus): models have been trained on the text as it is.
"""

from __future__ import annotations

import re

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

_FONTS = {"B", "I", "R", "SM", "SB"}
_ALTERNATING = {"BR", "RB", "BI", "IB", "IR", "RI"}
_BREAKS = {"PP", "P", "LP", "HP", "TP", "TQ", "IP", "RS", "RE", "sp", "bp"}


def is_mdoc(source: str) -> bool:
    """Whether the page is written with the mdoc macros (`.Dd`, `.Sh`)."""
    return (
        re.search(r"^\.S[Hh]\b", source, re.MULTILINE) is None
        or re.search(r"^\.Sh\b", source, re.MULTILINE) is not None
    )


def sections(source: str) -> list[tuple[str, str]]:
    """(heading, text) of every `.SH` section, in order; what stands before the first one is dropped.

    >>> sections('.TH X 1\\n.SH NAME\\nls \\\\- list\\n.B all\\nfiles\\n.PP\\nMore.')
    [('NAME', 'ls - list all files\\n\\nMore.')]
    """
    found: list[tuple[str, list[str]]] = []
    filled, lines = True, iter(source.replace("\\\n", "").split("\n"))
    blocks: list[str] = []

    def add(text: str) -> None:
        """One more piece of the current paragraph: on its own line in an example, after a space elsewhere."""
        if not filled:
            blocks[-1] += ("\n" if blocks[-1] else "") + text
        elif text.strip():
            blocks[-1] += (" " if blocks[-1] else "") + text.strip()

    waiting = False  # the line after .SH without argument, or after .TP, is a heading
    for line in lines:
        if line.startswith((".", "'")):
            name, _, rest = line[1:].strip().partition(" ")
            if not name or name.startswith('\\"'):
                continue
            if name in {"de", "am", "ig", "de1"}:  # a macro's definition, up to the line with two dots
                for skipped in lines:
                    if skipped.startswith(".."):
                        break
            elif name == "TS":  # tables: their format lines are no language
                for skipped in lines:
                    if skipped.startswith(".TE"):
                        break
            elif name == "SH":
                blocks, filled = [""], True
                found.append((_plain(" ".join(_words(rest))), blocks))
                waiting = not rest.strip()
            elif not found:
                continue
            elif name == "SS":
                filled = True
                blocks += [_plain(" ".join(_words(rest))), ""]
            elif name in {"nf", "EX"}:
                filled = False
                blocks.append("")
            elif name in {"fi", "EE"}:
                filled = True
                blocks.append("")
            elif name in _BREAKS:
                blocks.append("")
                if name == "IP" and (words := _words(rest)):
                    add(_plain(words[0]))
            elif name in _FONTS:
                add(_plain(" ".join(_words(rest))))
            elif name in _ALTERNATING:
                add(_plain("".join(_words(rest))))
            elif name in {"UR", "MT"}:
                continue  # the address of a link; its text follows
            elif name in {"UE", "ME"} and rest.strip():
                blocks[-1] += _plain(rest.strip())
            elif name == "SY":
                add(_plain(rest))
            elif name == "OP":
                add("[" + _plain(" ".join(_words(rest))) + "]")
        elif waiting and line.strip():
            found[-1] = (_plain(line), blocks)
            waiting = False
        elif found:
            if line.strip():
                add(_plain(line))
            elif filled:
                blocks.append("")
            else:
                add("")
    return [(heading, "\n\n".join(b.strip("\n") for b in blocks if b.strip())) for heading, blocks in found]


def _words(rest: str) -> list[str]:
    """The arguments of a request; quotes group words and double inside."""
    rest = re.sub(r'\s*\\".*$', "", rest)
    return [(a.replace('""', '"') if b == "" else b) for a, b in _WORD.findall(rest)]


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
    text = text.replace("\\.", ".").replace("\\(aq", "'").replace("\\e", "\x00").replace("\\\\", "\x00")
    return _OTHER.sub("", text).replace("\x00", "\\")
