"""From labelled text to batches: the tokenizer, the token cache, and which tokens are read at which step.

`prepare` is run once per corpus (parquet files train, validation, test with columns text and label) and leaves

    prepared/tokenizer/     byte-level BPE, trained on as much text of each label as of any other
    prepared/<split>.bin    uint16 token ids, label after label; every document begins with <|endoftext|>
    prepared/tokens.json    where each label begins, the corpus fingerprint, the special tokens

`Sampler` then says what a step reads, as a function of (seed, step) alone, so a resumed run needs no other memory.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas as pd

Ids = NDArray[np.uint16]

SPLITS = ("train", "validation", "test")
#: Both the beginning and the end of a document, as in GPT-2 and OLMoE, so a stream needs one token for both.
BOUNDARY, PAD = "<|endoftext|>", "<|pad|>"
#: Characters of each label that the tokenizer is trained on, at most.
TOKENIZER_SAMPLE = 500_000


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus.

    Attributes:
        path: the prepared directory.
        labels: those of the training split, sorted; the other splits may lack some or have more.
        spans: split -> label -> (begin, end) in the split's ids.
        ids: split -> all of its token ids, memory-mapped.
        vocabulary: size of the tokenizer's vocabulary.
        special: bos_token_id, eos_token_id, pad_token_id.
        fingerprint: sha256 over labels and texts of all splits, in order.
    """

    path: Path
    labels: list[str]
    spans: dict[str, dict[str, tuple[int, int]]]
    ids: Mapping[str, Ids]
    vocabulary: int
    special: dict[str, int]
    fingerprint: str

    def stream(self, split: str, label: str) -> Ids:
        """Token ids [token] of one label."""
        begin, end = self.spans[split][label]
        return self.ids[split][begin:end]

    def tokenizer(self) -> Any:
        """The tokenizer, as transformers' fast tokenizer."""
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(self.path / "tokenizer")

    def token_bytes(self) -> NDArray[np.int64]:
        """Bytes of text that each token id stands for [vocabulary]; 0 for special tokens."""
        tokenizer = self.tokenizer()
        texts = tokenizer.convert_ids_to_tokens(list(range(self.vocabulary)))
        # in a byte-level vocabulary each character of a token's name is one byte
        return np.array([0 if t in (BOUNDARY, PAD) else len(t) for t in texts], dtype=np.int64)


def prepare(data: Path, vocabulary: int, prepared: Path | None = None) -> Corpus:
    """Opens the prepared form of the corpus in directory `data`, making it first if need be.

    Raises:
        ValueError: a split is missing, lacks a column or is empty; the vocabulary does not fit in 16
            bits or is smaller than the 256 bytes and the special tokens.
    """
    if not 258 <= vocabulary <= 65536:
        raise ValueError(f"vocabulary={vocabulary}: expected 258 (256 bytes, 2 special tokens) to 65536 (16 bits)")
    prepared = prepared or data / f"prepared-{vocabulary}"
    stamps = {split: _stamp(data / f"{split}.parquet") for split in SPLITS}
    if (prepared / "tokens.json").is_file():
        index = json.loads((prepared / "tokens.json").read_text(encoding="utf-8"))
        if index["stamps"] == stamps:
            return _open(prepared, index)
    frames = {split: _read(data / f"{split}.parquet") for split in SPLITS}
    labels = sorted(frames["train"]["label"].unique())
    prepared.parent.mkdir(parents=True, exist_ok=True)
    private = Path(tempfile.mkdtemp(prefix=f".{prepared.name}.", dir=prepared.parent))
    try:
        tokenizer = train_tokenizer(frames["train"], vocabulary)
        tokenizer.save_pretrained(private / "tokenizer")
        special = {f"{which}_token_id": getattr(tokenizer, f"{which}_token_id") for which in ("bos", "eos", "pad")}
        spans = {split: _write(private / f"{split}.bin", frames[split], tokenizer) for split in SPLITS}
        index = {"labels": labels, "spans": spans, "vocabulary": len(tokenizer), "special": special,
                 "fingerprint": _fingerprint(frames), "stamps": stamps}  # fmt: skip
        (private / "tokens.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(prepared, ignore_errors=True)  # of an older corpus
        private.rename(prepared)
    finally:
        shutil.rmtree(private, ignore_errors=True)
    return _open(prepared, index)


def train_tokenizer(frame: pd.DataFrame, vocabulary: int) -> Any:
    """A byte-level BPE tokenizer that puts <|endoftext|> before each text; the labels have equal weight."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    sample: list[str] = []
    for _, texts in frame.groupby("label", sort=True)["text"]:
        shuffled = texts.sample(frac=1.0, random_state=0)
        before = shuffled.str.len().cumsum() - shuffled.str.len()
        sample += [text[:TOKENIZER_SAMPLE] for text in shuffled[before < TOKENIZER_SAMPLE]]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOUNDARY, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(sample, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOUNDARY} $A", pair=f"{BOUNDARY} $A {BOUNDARY} $B", special_tokens=[(BOUNDARY, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=BOUNDARY, eos_token=BOUNDARY, pad_token=PAD)


class Sampler:
    """Which windows of which label each step reads.

    Rows are dealt in blocks of `BLOCK`: every block has the same number of rows of each label (in proportion to
    label size ** `power`: 0 balances the labels, 1 leaves them as they are) in an order of its own. A label's rows go
    through its windows without repetition, epoch after epoch; each epoch has its own order and its own offset, so the
    windows' edges fall elsewhere.
    """

    BLOCK = 1024

    def __init__(self, corpus: Corpus, context: int, batch: int, *, seed: int = 0, power: float = 0.0) -> None:
        self.streams = [corpus.stream("train", label) for label in corpus.labels]
        self.context, self.batch, self.seed = context, batch, seed
        sizes = np.array([len(stream) for stream in self.streams], dtype=float)
        if (short := int(sizes.argmin())) >= 0 and sizes[short] < 2 * context:
            raise ValueError(
                f"label {corpus.labels[short]!r} has {sizes[short]:.0f} training tokens, fewer than two windows of "
                f"{context}: give it more text, leave it out, or take a shorter context"
            )
        share = sizes**power / (sizes**power).sum() * self.BLOCK
        self.rows = np.maximum(1, np.floor(share)).astype(int)
        for label in np.argsort(self.rows - share)[: max(0, self.BLOCK - self.rows.sum())]:
            self.rows[label] += 1
        self.block = int(self.rows.sum())
        self._deal = functools.lru_cache(maxsize=4)(self._deal_block)
        self._order = functools.lru_cache(maxsize=4 * len(self.streams))(self._epoch_order)

    def window(self, row: int) -> tuple[int, int]:
        """(label number, offset in its stream) of the row-th window of the run."""
        block, place = divmod(row, self.block)
        label, nth = (int(x[place]) for x in self._deal(block))
        epoch, k = divmod(block * int(self.rows[label]) + nth, self._windows(label))
        shift, order = self._order(label, epoch)
        return label, shift + int(order[k]) * self.context

    def step(self, step: int) -> NDArray[np.int64]:
        """Token ids [batch, context] of one step."""
        at = [self.window(row) for row in range(step * self.batch, (step + 1) * self.batch)]
        return np.stack([self.streams[label][o : o + self.context] for label, o in at]).astype(np.int64)

    def seen(self, steps: int) -> list[Ids]:
        """What the first `steps` steps have read, as runs of adjacent tokens without repetition."""
        read = [np.zeros(len(stream), dtype=bool) for stream in self.streams]
        for row in range(steps * self.batch):
            label, offset = self.window(row)
            read[label][offset : offset + self.context] = True
        runs = []
        for stream, mask in zip(self.streams, read, strict=True):
            edges = np.flatnonzero(np.diff(np.concatenate(([0], mask.view(np.int8), [0]))))
            runs += [np.asarray(stream[a:b]) for a, b in edges.reshape(-1, 2)]
        return runs

    def _windows(self, label: int) -> int:
        return len(self.streams[label]) // self.context - 1  # one less, for the epoch's offset

    def _deal_block(self, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Label of each row of a block, and the how-manieth row of that label in the block it is."""
        labels = np.random.default_rng([self.seed, 0, block]).permutation(
            np.repeat(np.arange(len(self.rows)), self.rows)
        )
        nth = np.empty_like(labels)
        for label, count in enumerate(self.rows):
            nth[labels == label] = np.arange(count)
        return labels, nth

    def _epoch_order(self, label: int, epoch: int) -> tuple[int, NDArray[np.int64]]:
        random = np.random.default_rng([self.seed, 1, label, epoch])
        return int(random.integers(self.context)), random.permutation(self._windows(label))


def windows(stream: Ids, context: int, limit: int | None = None) -> NDArray[np.int64]:
    """Non-overlapping windows [window, context] of a stream; at most `limit` tokens, spread evenly over it."""
    whole = len(stream) // context
    if not whole:
        raise ValueError(f"a stream of {len(stream)} tokens has no window of {context}: give the label more text")
    rows = np.asarray(stream[: whole * context]).reshape(whole, context)
    if limit is not None and limit < whole * context:
        rows = rows[np.linspace(0, whole - 1, max(1, limit // context)).astype(int)]
    return rows.astype(np.int64)


def _read(file: Path) -> pd.DataFrame:
    import pandas as pd

    if not file.is_file():
        raise ValueError(f"{file}: no such file; a corpus is a directory with {', '.join(SPLITS)} as .parquet")
    frame = pd.read_parquet(file)
    for column in ("text", "label"):
        if column not in frame:
            raise ValueError(f"{file}: no column {column!r}; it has {', '.join(map(str, frame.columns))}")
    if frame.empty:
        raise ValueError(f"{file}: no rows")
    return frame


def _write(file: Path, frame: pd.DataFrame, tokenizer: Any) -> dict[str, tuple[int, int]]:
    """Tokenises one split, label after label."""
    spans, end = {}, 0
    with file.open("wb") as out:
        for label in sorted(frame["label"].unique()):
            begin, texts = end, frame.loc[frame["label"] == label, "text"].tolist()
            for first in range(0, len(texts), 1000):
                encoded = tokenizer.backend_tokenizer.encode_batch_fast(texts[first : first + 1000])
                ids = np.concatenate([np.array(one.ids, dtype=np.uint16) for one in encoded])
                out.write(ids.astype("<u2").tobytes())
                end += len(ids)
            spans[label] = (begin, end)
    return spans


def _open(prepared: Path, index: dict[str, Any]) -> Corpus:
    ids = {split: np.memmap(prepared / f"{split}.bin", dtype="<u2", mode="r") for split in SPLITS}
    spans = {split: {label: tuple(span) for label, span in index["spans"][split].items()} for split in SPLITS}
    return Corpus(
        prepared, index["labels"], spans, ids, index["vocabulary"], index["special"], index["fingerprint"]
    )  # fmt: skip


def _fingerprint(frames: dict[str, pd.DataFrame]) -> str:
    digest = hashlib.sha256()
    for split in SPLITS:
        for label, text in zip(frames[split]["label"], frames[split]["text"], strict=True):
            digest.update(f"{split}\0{label}\0{text}\0".encode())
    return digest.hexdigest()


def _stamp(file: Path) -> str:
    """sha256 of a file, to notice that the corpus has changed since it was prepared."""
    if not file.is_file():
        raise ValueError(f"{file}: no such file; a corpus is a directory with {', '.join(SPLITS)} as .parquet")
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
