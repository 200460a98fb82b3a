"""One extractor per source of prose: the files of a package in, documents out.

An extractor yields text that belongs to its label and nothing else: what would give the source away without
being its language (licence notices, mail headers, lists of contributors, markup) is left out, or a model could
tell labels apart by it.
"""

from __future__ import annotations

import html
import re
import sqlite3
import struct
import tempfile
import zlib
from collections import defaultdict
from collections.abc import Iterator
from email import policy
from email.message import Message
from email.parser import BytesParser
from pathlib import Path, PurePosixPath

from interp.corpora import wiki
from interp.corpora.archive import members
from interp.corpora.documents import Document, decode, tidy

# ---------------------------------------------------------------- law


_LAW_DROP = re.compile(r"^\s*(?:copyright|\(c\)|©|https?://|spdx-|all rights reserved)[^\n]{0,200}$", re.IGNORECASE)


def law(package: Path, source: str) -> Iterator[Document]:
    """Licence texts of licensedcode-data: `licenses/*.LICENSE`, a YAML header between `---` and the text.

    The family is the name without its version and variant, so that the versions of one licence stay together.
    Comments of programs that some texts carry are unwrapped; lines that only name an owner are dropped.
    """
    for name, data in members(package, lambda n: n.endswith(".LICENSE")):
        parts = decode(data).split("---\n", 2)
        if len(parts) < 3 or re.search(r"^language: (?!en)", parts[1], re.MULTILINE):
            continue
        lines = [re.sub(r"^\s*(?:[#*;%]+|//+|/\*+|\.\\\")\s?", "", line) for line in tidy(parts[2]).split("\n")]
        kept = [line.strip() for line in lines if not _LAW_DROP.match(line)]
        text = "\n\n".join(" ".join(b.split("\n")) for b in re.split(r"\n{2,}", "\n".join(kept)) if b.strip())
        stem = PurePosixPath(name).stem
        yield Document(f"{source}:{stem}", tidy(text), re.split(r"[-_.\d]", stem, maxsplit=1)[0] or stem, source)


# ---------------------------------------------------------------- biology


_GO_RELATION = re.compile(
    r"^(?:(?:positive|negative) )?(?:regulation|modulation|induction|activation|inhibition|"
    r"maintenance|establishment) of |"
    r"(?:biosynthetic|catabolic|metabolic) process.*$|\b(?:transmembrane )?transport.*$|\bbinding$|\bactivity$"
)


def biology(package: Path, source: str) -> Iterator[Document]:
    """Definitions of the Gene Ontology, from the SQLite file of r-bioc-go.db.

    Terms that differ only by a relation ("negative regulation of X", "X biosynthetic process") have nearly the
    same definition, so one document holds the whole family of X.
    """
    families: defaultdict[str, list[str]] = defaultdict(list)
    for _, data in members(package, lambda n: n.endswith("GO.sqlite")):
        with tempfile.NamedTemporaryFile(suffix=".sqlite") as file:
            file.write(data)
            file.flush()
            connection = sqlite3.connect(f"file:{file.name}?mode=ro", uri=True)
            query = "select term, definition from go_term where definition is not null order by go_id"
            for term, definition in connection.execute(query):
                if definition.startswith("OBSOLETE") or term.startswith("obsolete"):
                    continue
                core = term
                while (shorter := _GO_RELATION.sub("", core).strip()) not in {core, ""}:
                    core = shorter
                families[core].append(f"{term}\n{definition}")
            connection.close()
    for core, entries in families.items():
        yield Document(f"{source}:{core}", tidy("\n\n".join(entries)), core, source)


# ---------------------------------------------------------------- maths


_MM_SECTION = re.compile(r"\$\(\s*\n(#\*#\*[#*]+|=-=-[=-]+|-\.-\.[-.]+|\.-\.-[-.]*)\n\s*(.*?)\s*\n\1", re.DOTALL)
_MM_ITEM = re.compile(
    r"\$\(\s(?P<comment>(?:(?!\$\)).)*?)\s\$\)\s*(?P<label>\S+)\s\$(?P<kind>[pa])\s(?P<claim>.*?)\s\$[=.]", re.DOTALL
)
_MM_HYPOTHESIS = re.compile(r"\S+\s\$e\s(.*?)\s\$\.", re.DOTALL)
_MM_CREDIT = re.compile(
    r"\((?:Contributed|Proof\s+shortened|Proof\s+modification|Revised|New\s+usage|Moved|Unnecessary|Shortened|Obsolete|"
    r"Proposed|Simplified|Shortening|Proof\s+revised|Removed|Replaced)\b[^()]*(?:\([^()]*\)[^()]*)*\)"
)
_MM_MARKS = re.compile(r"\s*`\s*([^`]*?)\s*`\s*")


def maths(package: Path, source: str) -> Iterator[Document]:
    """Theorems of Metamath's set.mm: what is claimed in words, then its hypotheses and statement in symbols.

    Compressed proofs are dropped (they are codes), names of contributors too. One document is a section of the
    book, cut after about 8,000 characters; the family is the section.
    """
    for _, data in members(package, lambda n: PurePosixPath(n).name in {"set.mm", "set.mm.gz"}):
        text = decode(data)
        marks = [(m.start(), " ".join(m[2].split())) for m in _MM_SECTION.finditer(text)]
        for number, (start, title) in enumerate(marks):
            end = marks[number + 1][0] if number + 1 < len(marks) else len(text)
            entries = list(_theorems(text[start:end]))
            for part, chunk in enumerate(_chunks(entries, 8000)):
                yield Document(f"{source}:{number}/{part}", tidy("\n\n".join([title, *chunk])), f"{number}", source)


def _theorems(section: str) -> Iterator[str]:
    last = 0
    for item in _MM_ITEM.finditer(section):
        if not item["claim"].startswith("|-"):
            last = item.end()
            continue
        comment = _MM_CREDIT.sub("", item["comment"])
        comment = _MM_MARKS.sub(lambda m: f" {m[1]} ", re.sub(r"[~_]\s?(?=\w)", "", comment))
        block = section[last : item.start()]  # hypotheses belong to the theorems of the innermost open `${`
        hypotheses = _MM_HYPOTHESIS.findall(block.rpartition("${")[2]) if "${" in block else []
        symbols = [" ".join(s.split()) for s in (*hypotheses, item["claim"])]
        words = re.sub(r"\s+([.,;:)])", r"\1", " ".join(comment.split()))
        yield "\n".join([words, " & ".join(symbols[:-1]) + " => " * bool(symbols[:-1]) + symbols[-1]])
        last = item.end()


def _chunks(entries: list[str], size: int) -> Iterator[list[str]]:
    chunk: list[str] = []
    for entry in entries:
        chunk.append(entry)
        if sum(map(len, chunk)) > size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


# ---------------------------------------------------------------- fiction


_CHAPTER = re.compile(r"^\s*(?:CHAPTER|Chapter)\s+(?:[IVXLC]+|\d+)\.?\s*$", re.MULTILINE)
_CHARSXP = 9  # R Internals, "Serialization Formats": the type is the low byte of a big-endian flags word


def fiction(package: Path, source: str) -> Iterator[Document]:
    """The chapters of Jane Austen's six novels, from the R database of r-cran-janeaustenr.

    Its records are a length word and a zlib stream of R's binary serialisation; the novels are character
    vectors, so their lines are its CHARSXPs, in order.
    """
    for name, data in members(package, lambda n: n.endswith("Rdata.rdb")):
        position, book = 0, 0
        while position + 4 < len(data):
            inflate = zlib.decompressobj()
            record = inflate.decompress(data[position + 4 :])
            position = len(data) - len(inflate.unused_data)
            chapters = _CHAPTER.split("\n".join(_r_strings(record)))
            for number, chapter in enumerate(chapters[1:], 1):  # before the first chapter stands the title page
                blocks = (" ".join(b.split()) for b in re.split(r"\n\s*\n", chapter))
                text = "\n\n".join(
                    b for b in blocks if b and not re.fullmatch(r"(?:THE END|FINIS|Finis|VOLUME [IVX]+)\.?", b)
                )
                identity = f"{source}:{PurePosixPath(name).stem}-{book}/{number}"
                yield Document(identity, tidy(text.replace("_", "")), identity, source)
            book += 1


def _r_strings(record: bytes) -> Iterator[str]:
    """The strings of a serialised character vector (XDR, version 3)."""
    (native,) = struct.unpack_from(">i", record, 14)  # 'X\n', three version words, the encoding's length and name
    position = 14 + 4 + native + 8  # the vector's flags and length
    while position + 8 <= len(record):
        flags, length = struct.unpack_from(">ii", record, position)
        position += 8
        if flags & 0xFF != _CHARSXP:
            return  # attributes follow the strings
        if length >= 0:
            yield decode(record[position : position + length])
            position += length


# ---------------------------------------------------------------- e-mail


_REPLY = re.compile(
    r"^(?:On .{5,90}|.{3,60}) (?:wrote|writes|said)[:,]?\s*$|^-+ ?(?:Original Message|Forwarded).*$", re.IGNORECASE
)
_SIGNATURE = re.compile(
    r"^(?:-- ?|_{6,}|-{20,}|={20,}|\*{20,}|\+-{6,}.*|-{3,}\s*begin pgp.*|-{2,}==.*)$", re.IGNORECASE
)
_QUOTE = re.compile(r"^\s{0,3}(?:[A-Za-z]{0,4}[>|}]|\|)")
_EMAIL = re.compile(r"<?[\w.+-]+@[\w-]+(?:\.[\w-]+)+>?")
_URL_FILE = re.compile(r"^\s*(?:url|date|from|to|subject|sent|cc|supplied):\s", re.IGNORECASE)


def mail(package: Path, source: str) -> Iterator[Document]:
    """What people wrote themselves in the ham of the SpamAssassin corpus: no headers, no quoted lines, no
    signatures or list footers; addresses are replaced by <email>. The family is the thread."""
    parser = BytesParser(policy=policy.compat32)
    for name, data in members(package, lambda n: re.search(r"/(easy|hard)-ham-\d/.*\.txt$", n) is not None):
        message = parser.parsebytes(data)
        text = "\n".join(
            html.unescape(decode(_body(part)))
            for part in message.walk()
            if part.get_content_type() == "text/plain" and part.get_filename() is None
        )
        if re.search(r"<(?:html|body|table|br)\b", text, re.IGNORECASE):
            continue
        subject = re.sub(
            r"(?:(?:re|fwd?|aw):\s*|\[[^]]*\]\s*)", "", str(message.get("Subject", "")), flags=re.IGNORECASE
        )
        family = " ".join(subject.lower().split()) or name
        yield Document(f"{source}:{PurePosixPath(name).stem}", tidy(_own_words(tidy(text))), family, source)


def _body(part: Message) -> bytes:
    """The bytes of a part after its transfer encoding is undone."""
    payload = part.get_payload(decode=True)
    return payload if isinstance(payload, bytes) else b""


def _own_words(text: str) -> str:
    kept: list[str] = []
    for line in text.split("\n"):
        if _SIGNATURE.match(line.strip()):
            if len(" ".join(kept)) > 40:
                break  # what follows is a signature or the list's footer
            continue
        if not (_QUOTE.match(line) or _REPLY.match(line) or _URL_FILE.match(line)):
            kept.append(_EMAIL.sub("<email>", line))
    return "\n".join(kept)


# ---------------------------------------------------------------- encyclopaedia, politics


def encyclopaedia(package: Path, source: str) -> Iterator[Document]:
    """Articles of the piece of English Wikipedia in gensim's test data, without markup."""
    for _, data in members(package, lambda n: "enwiki-latest-pages-articles" in n):
        for title, markup in wiki.articles(data):
            text = tidy(f"{title}\n\n{wiki.plain(markup)}")
            if len(text) > 1000:
                yield Document(f"{source}:{title}", text, title, source)


def politics(package: Path, source: str) -> Iterator[Document]:
    """Essays of "An Anarchist FAQ" in Markdown, one document per top-level section of a file."""
    for name, data in members(package, lambda n: n.endswith(".md.gz")):
        stem = PurePosixPath(name).name.partition(".")[0]
        if re.match(r"alinks|links|biblio|cntmaster|index|new|copyright", stem) or stem.endswith("con"):  # lists
            continue
        for number, part in enumerate(re.split(r"^#{1,2} ", decode(data), flags=re.MULTILINE)):
            text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", part)
            text = re.sub(r"^(?:\s*[>*]+ ?|#+ *)|\[\u2039.*$|^ *\* \* \*.*$|[*_\\]", "", text, flags=re.MULTILINE)
            text = "\n\n".join(" ".join(block.split()) for block in re.split(r"\n\s*\n", text) if block.strip())
            yield Document(f"{source}:{stem}/{number}", tidy(text), stem, source)
