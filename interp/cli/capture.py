"""`interp capture`."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from interp.cli.common import emit, stderr, stdout, summary

if TYPE_CHECKING:
    from interp.cli.lines import Lines

StoredDtype = Literal["bfloat16", "float16", "float32"]


def command(
    model: Annotated[str, typer.Argument(help="A zoo name, a hub id, a directory, a .gguf file, or tiny:FAMILY.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The dataset's directory: new, or one to resume.")],
    text: Annotated[list[str] | None, typer.Option("--text", "-t", help="A text. Repeatable.")] = None,
    file: Annotated[Path | None, typer.Option("--file", help="A text file, one text per line.")] = None,
    dataset: Annotated[
        Path | None,
        typer.Option("--dataset", help="A .jsonl file: one object per line, with a text or input_ids."),
    ] = None,
    sites: Annotated[
        list[str] | None,
        typer.Option("--sites", "-s", help='What to keep, such as "resid_post[*]". Repeatable, or with commas.'),
    ] = None,
    text_field: Annotated[str, typer.Option(help="Where a .jsonl row keeps its text.")] = "text",
    label_field: Annotated[str | None, typer.Option(help="Where a .jsonl row keeps its label.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Take the first so many texts of a file.")] = None,
    dtype: Annotated[StoredDtype, typer.Option(help="Of the stored activations.")] = "bfloat16",
    model_dtype: Annotated[
        str, typer.Option(help="The model computes in this; auto is the checkpoint's own.")
    ] = "float32",
    device: Annotated[str | None, typer.Option(help="Where the model runs, such as cuda.")] = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens per window; longer texts are cut into windows.")] = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows per forward pass.")] = 8,
    tokenizer: Annotated[str | None, typer.Option(help="A tokenizer from elsewhere: a directory or hub id.")] = None,
    revision: Annotated[str | None, typer.Option(help="The hub commit, branch or tag.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the checkpoint's own Python.")
    ] = False,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Read weights that are only a pickle.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Run a model over texts and keep its activations as a dataset on disk.

    A run that was stopped goes on where it was when the same command is given again. Texts come from exactly
    one of --text, --file and --dataset.

    Example:

    ```
    interp capture smollm2 --text "The capital of France is Paris." \\
        --sites "resid_post[*]" --out acts
    ```
    """
    texts, labels = _texts(text, file, dataset, text_field, label_field, limit)
    import interp
    from interp import store

    opened = interp.load(
        model,
        tokenizer,
        dtype=model_dtype,
        device=device,
        revision=revision,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
    )
    stderr().print(str(opened), markup=False, highlight=False, soft_wrap=True)
    start = time.perf_counter()
    written = store.write(
        opened,
        texts,
        _split(sites or ["resid_post[*]"]),
        out,
        labels=labels,
        text_column=text_field,
        dtype=dtype,
        context=context,
        batch_size=batch_size,
    )
    seconds = time.perf_counter() - start
    if as_json:
        about = {"name": opened.name, "fingerprint": opened.fingerprint, "card": opened.card}
        emit({"model": about, "seconds": round(seconds, 3), **summary(written)})
    else:
        about = summary(written)
        where = "1 site" if len(about["sites"]) == 1 else f"{len(about['sites'])} sites"
        stdout().print(
            f"{about['tokens']} tokens at {where} in {seconds:.1f} s, "
            f"{about['bytes'] / 2**20:.1f} MiB in {about['directory']}",
            highlight=False,
            soft_wrap=True,
        )


def _texts(
    text: list[str] | None,
    file: Path | None,
    dataset: Path | None,
    text_field: str,
    label_field: str | None,
    limit: int | None,
) -> tuple[list[str] | Lines, Any]:
    """(texts, labels) as store.write takes them, from the one source that was given."""
    from interp.cli import lines

    given = [name for name, value in (("--text", text), ("--file", file), ("--dataset", dataset)) if value]
    if len(given) != 1:
        raise typer.BadParameter(
            f"give exactly one of --text, --file and --dataset ({' and '.join(given) or 'none'} given)"
        )
    if label_field and not dataset:
        raise typer.BadParameter(f"--label-field belongs to --dataset, not to {given[0]}")
    if text:
        return text[:limit], None
    if file:
        return lines.texts(file, limit), None
    assert dataset is not None
    rows = lines.rows(dataset, limit)
    if text_field not in rows[0] and "input_ids" not in rows[0]:
        raise ValueError(f"{dataset}: no field {text_field!r}; its rows have {', '.join(rows[0])} (--text-field)")
    return rows, label_field


def _split(sites: list[str]) -> list[str]:
    """Patterns from repeated options; a comma separates them too, unless it is inside brackets."""
    return [part.strip() for given in sites for part in re.split(r",(?![^\[]*\])", given) if part.strip()]
