"""The one error of the zoo, and the notice that a slow, once-only step is under way."""

from __future__ import annotations

import sys


class LoadError(ValueError):
    """A model could not be opened. The message names the source, what was found, what was expected and the
    mend."""


def notice(message: str) -> None:
    """Say on standard error that something slow happens once (a download, a conversion).

    Standard output belongs to results: `--json` prints one document there and nothing else.
    """
    sys.stderr.write(f"interp: {message}\n")
    sys.stderr.flush()
