from __future__ import annotations

import bz2
import gzip
import sqlite3
import struct
import zlib
from pathlib import Path

from interp.corpora import prose, wiki
from interp.corpora.documents import paragraphs
from interp.corpora.parallel import LANGUAGES, parallel


def test_law(pack):
    text = "---\nkey: mit\nname: MIT\n---\n\nCopyright (c) 2020 Somebody\n\nPermission is granted\nto any person.\n"
    german = "---\nlanguage: de\n---\nErlaubnis"
    package = pack(
        "l.whl",
        {
            "licensedcode/data/licenses/mit-modern.LICENSE": text,
            "licensedcode/data/licenses/de.LICENSE": german,
            "licensedcode/data/rules/mit_1.RULE": text,
        },
    )
    (document,) = prose.law(package, "l")
    assert document.text.strip() == "Permission is granted to any person."
    assert document.family == "mit"
    assert document.id == "l:mit-modern"


def test_law_unwraps_comments(pack):
    text = "---\nkey: x\n---\n/* You may\n * copy this.\n */\n# And share it.\n"
    (document,) = prose.law(pack("l.whl", {"a/x-1.0.LICENSE": text}), "l")
    assert document.text.replace("/", "").split() == ["You", "may", "copy", "this.", "And", "share", "it."]


def test_biology_keeps_a_family_together(pack, tmp_path):
    path = tmp_path / "GO.sqlite"
    connection = sqlite3.connect(path)
    connection.execute("create table go_term (go_id text, term text, definition text)")
    rows = [
        ("GO:1", "cell growth", "A cell grows."),
        ("GO:2", "positive regulation of cell growth", "Something makes it grow."),
        ("GO:3", "lipid catabolic process", "Lipids break."),
        ("GO:4", "lipid biosynthetic process", "Lipids form."),
        ("GO:5", "obsolete thing", "OBSOLETE. Gone."),
        ("GO:6", "undefined", None),
    ]
    connection.executemany("insert into go_term values (?, ?, ?)", rows)
    connection.commit()
    connection.close()
    package = pack("g.deb", {"usr/lib/R/GO.sqlite": path.read_bytes()})
    found = {d.family: d.text for d in prose.biology(package, "g")}
    assert set(found) == {"cell growth", "lipid"}
    assert found["cell growth"].split("\n\n")[1] == "positive regulation of cell growth\nSomething makes it grow."


METAMATH = """$( The file. $)
$(
=-=-=-=-=-=-=-=-=-=-=
        Negation
=-=-=-=-=-=-=-=-=-=-=
  About it.
$)
  $( A wff. $)
  wn $a wff -. ph $.
  ${
    a1.1 $e |- ph $.
    a1.2 $e |- ( ph -> ps ) $.
    $( Inference from ~ ax-mp with ` ph ` .  (Contributed by A. Person (of X),
       1-Jan-2000.)  (Proof shortened by B, 2-Feb-2002.) $)
    a1 $p |- ps $= ( wi ax ) ABCD $.
  $}
  $( An axiom. $)
  ax-1 $a |- ( ph -> ( ps -> ph ) ) $.
$(
=-=-=-=-=-=-=-=-=-=-=
        Next
=-=-=-=-=-=-=-=-=-=-=
$)
  $( Last. $)
  b2 $p |- ch $= ? $.
"""


def test_maths(pack):
    documents = list(prose.maths(pack("m.deb", {"usr/share/metamath/set.mm": METAMATH}), "m"))
    assert [d.family for d in documents] == ["0", "1"]
    title, inference, axiom = paragraphs(documents[0].text)
    assert title == "Negation"
    assert inference == "Inference from ax-mp with ph.\n|- ph & |- ( ph -> ps ) => |- ps"
    assert axiom == "An axiom.\n|- ( ph -> ( ps -> ph ) )"
    assert "ABCD" not in documents[0].text


def test_fiction_reads_the_serialisation_of_r(pack):
    lines = ["EMMA", "CHAPTER I", "", "Emma was", "happy.", "", "_Very_ happy.", "FINIS", "Chapter 2", "", "É fine."]
    body = b"X\n" + struct.pack(">iii", 3, 0x040201, 0x030500) + struct.pack(">i", 5) + b"UTF-8"
    body += struct.pack(">ii", 16, len(lines))
    for line in lines:
        body += struct.pack(">ii", 0x00040009, len(line.encode())) + line.encode()
    record = struct.pack(">I", len(body)) + zlib.compress(body)
    documents = list(prose.fiction(pack("f.deb", {"usr/lib/R/data/Rdata.rdb": record * 2}), "f"))
    assert [d.text for d in documents[:2]] == ["Emma was happy.\n\nVery happy. FINIS", "É fine."]
    assert len({d.id for d in documents}) == 4


MAIL = """From: Someone <someone@example.org>
Subject: Re: [list] the thing
Content-Type: text/plain; charset=utf-8
Content-Transfer-Encoding: quoted-printable

On Tue, 27 Aug 2002, Jon wrote:

> I had a thing.
>> And another.

I have done exactly this with the thing, and it w=
orked &amp; lasted. Ask a.person@example.com or <b@example.com>.

--=20
Someone, list maintainer
"""


def test_mail_keeps_own_words_only(pack):
    package = pack(
        "s.tgz",
        {
            "package/data/easy-ham-1/1.txt": MAIL,
            "package/data/easy-ham-1/1.json": "{}",
            "package/data/spam-1/2.txt": MAIL,
            "package/data/hard-ham-1/3.txt": MAIL.replace("I have done", "<html><body>I have done"),
        },
    )
    (document,) = prose.mail(package, "s")
    assert document.text == ("I have done exactly this with the thing, and it worked & lasted. Ask <email> or <email>.")
    assert document.family == "the thing"


MARKUP = """{{Infobox|a={{b|c}}}}
'''Law''' is a [[system]] of [[Rule of law|rules]]<ref name="x">Book {{cite}}</ref>.
[[File:x.jpg|thumb|A [[link]] in it]]
{| class="t"
| cell
|}
== History ==
* Old [http://example.org laws].
<!-- hidden -->
== References ==
{{reflist}}
* A book
"""


def test_encyclopaedia(pack):
    long = MARKUP.replace("* Old", "* Old " + "and very old " * 90)
    pages = "".join(
        f"<page><title>{title}</title><ns>{ns}</ns><revision><text>{_escape(text)}</text></revision></page>"
        for title, ns, text in (("Law", 0, long), ("Talk:Law", 1, long), ("Act", 0, "#REDIRECT [[Law]]"))
    )
    dump = bz2.compress(f"<mediawiki>{pages}<page><title>cut".encode())  # a dump that stops in the middle
    package = pack("g.whl", {"gensim/test/test_data/enwiki-latest-pages-articles1.bz2": dump})
    (document,) = prose.encyclopaedia(package, "g")
    blocks = paragraphs(document.text)
    assert blocks[:3] == ["Law", "Law is a system of rules.", "History"]
    assert blocks[3].endswith("laws.")
    assert len(blocks) == 4


def test_wiki_nests_deeply():
    assert wiki.plain("a {{b {{c {{d}} }} }} e") == "a e"


def test_politics(pack):
    text = "# A.1 What is it?\n\nIt is a _good_ [idea](x.md#y) of\n**everybody**.\n\n> Quoted *words*.\n"
    files = {"secA1.md.gz": gzip.compress(text.encode()), "alinks.md.gz": gzip.compress(b"# L"), "secAcon.md.gz": b""}
    files["secAcon.md.gz"] = gzip.compress(b"# Contents")
    package = pack("a.deb", {f"usr/share/doc/a/markdown/{name}": data for name, data in files.items()})
    texts = [d.text for d in prose.politics(package, "a") if d.text]
    assert [t.split("\n\n") for t in texts] == [["A.1 What is it?", "It is a good idea of everybody. Quoted words."]]


def test_parallel_pages_stay_aligned(pack):
    def page(*paragraphs_: str) -> str:
        body = "".join(f"<item><p>{p}</p></item>" for p in paragraphs_)
        info = "<info><desc>no</desc><credit><p>no</p></credit></info>"
        return f'<page xmlns="http://projectmallard.org/1.0/">{info}<title>The title of this page</title>{body}</page>'

    files = {}
    for language in LANGUAGES:
        folder = f"usr/share/help/{'C' if language == 'en' else language}/gnome-help"
        second = "Not translated by everybody here" if language in ("en", "pl") else f"Zwei zwei zwei zwei {language}"
        first = page(f"One two <em>three</em> {language}", second, f"Four five six {language}")
        files[f"{folder}/good.page"] = first.replace("The title of this", f"{language} title of this")
        files[f"{folder}/other.page"] = page(*(["x y z w"] * (2 if language == "ru" else 3)))
    found = dict(parallel(pack("h.deb", files), "h"))
    assert set(found) == set(LANGUAGES)
    assert found["de"].text == "de title of this page\n\nOne two three de\n\nFour five six de"
    assert {len(paragraphs(d.text)) for d in found.values()} == {3}
    assert {d.family for d in found.values()} == {"gnome-help/good"}


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")


def test_sources_are_listed_in_the_readme():
    from interp.corpora.sources import SOURCES

    readme = (Path(__file__).resolve().parents[2] / "data/corpora/README.md").read_text(encoding="utf-8")
    for source in SOURCES.values():
        assert f"| `{source.package}` | {source.version} | {source.kind} |" in readme
        assert source.licence in readme
