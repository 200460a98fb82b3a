"""What every command shares: where output goes, how a failure is told, how a result becomes one JSON
document.

Standard output carries results only; progress, notices and errors go to standard error. Exit codes: 0 done, 1
the input or the machine does not allow it (said in one plain sentence), 2 the command line itself is wrong.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    import pandas as pd

    from interp.store import ActivationDataset

#: Errors that a user's input or machine can cause. Everything else is a bug of ours and shows its traceback.
#: Our own errors (LoadError, SiteError, StoreError, ...) are ValueErrors or OSErrors.
USER_ERRORS = (ValueError, OSError)

TRACEBACK_VARIABLE = "INTERP_TRACEBACK"

#: The model of a command that has no other argument: `interp steer smollm2`, or `--model smollm2` anywhere on the line.
ModelArgument = Annotated[
    str | None, typer.Argument(metavar="MODEL", help="A zoo name, a hub id, a directory, or tiny:FAMILY.")
]
ModelOption = Annotated[str | None, typer.Option("--model", "-m", help="The model, as an option.")]


def stdout() -> Console:
    """The console for results (made at call time, so that a redirected stream is respected)."""
    return Console(file=sys.stdout)


def stderr() -> Console:
    """The console for progress, notices and errors."""
    return Console(file=sys.stderr)


def emit(document: Any) -> None:
    """Print exactly one JSON document on standard output. NaN and infinities become null: JSON has none."""
    sys.stdout.write(json.dumps(_plain(document), indent=2, ensure_ascii=False) + "\n")


def records(frame: Any) -> list[dict[str, Any]]:
    """A DataFrame as a list of plain dictionaries, one per row."""
    return [_plain(row) for row in frame.to_dict("records")]


def fail(error: BaseException) -> int:
    """Tell a user's error in plain words on standard error and return the exit code."""
    if os.environ.get(TRACEBACK_VARIABLE):
        traceback.print_exception(error)
    stderr().print(f"interp: error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
    return 1


def named_model(argument: str | None, option: str | None, default: str | None = None) -> str:
    """The one model that the command line names, as argument or as option; else the default."""
    if argument is not None and option is not None:
        raise typer.BadParameter(f"the model is given twice: {argument} and --model {option}")
    model = argument or option or default
    if model is None:
        raise typer.BadParameter("give a model, such as smollm2", param_hint="MODEL")
    return model


def remake() -> str | None:
    """The command line that is running, as one types it; None where Python called and not a shell."""
    by_command = Path(sys.argv[0]).name in ("interp", "__main__.py")
    return shlex.join(["interp", *sys.argv[1:]]) if by_command else None


def keep(table: pd.DataFrame, path: Path) -> str:
    """Write a Table with its settings and the command that made it, which `interp report` shows; gives the path."""
    from interp import report

    return str(report.save_table(table, path, remake()))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(item) for item in value]
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:  # numpy and torch scalars
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def summary(dataset: ActivationDataset) -> dict[str, Any]:
    """What a dataset on disk holds: directory, tokens, sites, size in bytes, checksum of its content."""
    from interp.sites import Site

    files = [file for file in dataset.path.rglob("*") if file.is_file()]
    return {
        "directory": str(dataset.path),
        "complete": dataset.complete,
        "tokens": dataset.n_rows,
        "sites": [str(site) for site in sorted(Site.parse(text) for text in dataset.sites)],
        "bytes": sum(file.stat().st_size for file in files),
        "content_sha256": dataset.content_sha256,
    }
