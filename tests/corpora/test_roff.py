from __future__ import annotations

import pytest

from interp.corpora import roff
from interp.corpora.manuals import manuals, speaks

PAGE = r""".\" Copyright somebody
.TH ls 1 "today"
.SH NAME
ls \- list "directory" contents
.SH SYNOPSIS
.B ls
.RI [ OPTION ]...
.SH DESCRIPTION
Lists \fBfiles\fP and
.I directories
(see
.BR stat (2)).
.\" hidden
.PP
A second\ paragraph with \(aqquotes\(aq and \[lq]more\[rq].
.TP
.B \-a
all entries
.nf
int main(void)
{
    return 0; \e n
}
.fi
.TS
l l.
a	b
.TE
.SH "SEE ALSO"
.BR cp (1),
.BR mv (1)
.SH COPYRIGHT
Copyright is held by its holders.
"""


def test_sections():
    found = dict(roff.sections(PAGE))
    assert found["NAME"] == 'ls - list "directory" contents'
    assert found["SYNOPSIS"] == "ls [OPTION]..."
    assert found["SEE ALSO"] == "cp(1), mv(1)"
    first, second, option, code = found["DESCRIPTION"].split("\n\n")
    assert first == "Lists files and directories (see stat(2))."
    assert second == "A second paragraph with 'quotes' and “more”."
    assert option == "-a all entries"
    assert code == "int main(void)\n{\n    return 0; \\ n\n}"


@pytest.mark.parametrize(
    ("escaped", "plain"),
    [
        (r"\fIa\fR", "a"),
        (r"\f[CW]b\f[]", "b"),
        (r"\s-1small\s0", "small"),
        (r"a\-b", "a-b"),
        (r"\*(lqx\*(rq", "“x”"),
        (r"1\h'2n'2", "12"),
        (r"C:\eDIR", "C:\\DIR"),
        (r"word \" comment", "word "),
        (r"na\[:i]ve \(:oy", "nave öy"),
        (r"\&.start", ".start"),
    ],
)
def test_escapes(escaped, plain):
    ((_, text),) = roff.sections(f".SH X\n{escaped}")
    assert text == plain.strip()


def test_manuals_leave_out_what_is_not_the_manual(pack):
    german = PAGE.replace("Lists", "Die Datei wird mit der Option für das Verzeichnis gelesen und").replace(
        "all entries", "This is what nobody has translated so far, and it is still in English on that page."
    )
    package = pack(
        "m.deb",
        {
            "usr/share/man/man1/ls.1": PAGE,
            "usr/share/man/man1/dir.1.gz": b"",
            "usr/share/man/de/man1/ls.1.gz": _gz(german),
            "usr/share/man/de/man1/alias.1.gz": _gz(".so man1/ls.1"),
            "usr/share/doc/x.gz": _gz("nothing"),
        }
        | {"usr/share/man/man1/ls.1.gz": _gz(PAGE), "usr/share/man/man1/dir.1.gz": _gz(".Dd today\n.Sh NAME\nmdoc")},
    )
    (english,) = manuals(package, "m")
    assert english.id == "m:ls.1"
    assert english.family == "ls"
    assert "Copyright" not in english.text
    assert english.text.startswith("NAME\n\nls - list")
    (translated,) = manuals(package, "m", language="de")
    assert "Die Datei wird" in translated.text
    assert "nobody has translated" not in translated.text
    assert "int main(void)" in translated.text  # code has no language


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("de", "Die Option wird nicht mit der Datei und dem Verzeichnis gelesen"),
        ("fr", "Cette option est dans le fichier et les options sont pour une commande"),
        ("es", "La opción no es para el archivo y los nombres se leen con la orden"),
        ("pl", "Ten program nie jest dla pliku i może być użyty przez system lub oraz"),
        ("ru", "Этот вызов не меняет файл и возвращает ноль для всех процессов"),
    ],
)
def test_speaks(language, text):
    assert speaks(text, language)
    assert not speaks("This is the text that is not in the language of the page and it is not for it", language)
    assert speaks("read(2)", language)


def _gz(text: str) -> bytes:
    import gzip

    return gzip.compress(text.encode())
