"""Silence for what other packages say while we call them. Nothing is set on import, and everything is put back."""

from __future__ import annotations

import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_LOCK = threading.RLock()


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' bars ("Loading weights", "Writing model shards"), load reports and warnings while it is
    open: what they would say is raised or irrelevant."""
    from transformers.utils import logging as hf_logging

    logger = logging.getLogger("transformers")
    with _LOCK:  # both switches belong to the process: two threads must not restore each other's silence
        level, bar = logger.level, hf_logging.is_progress_bar_enabled()
        logger.setLevel(logging.ERROR)
        hf_logging.disable_progress_bar()
        try:
            yield
        finally:
            logger.setLevel(level)
            if bar:
                hf_logging.enable_progress_bar()


def import_tqdm() -> None:
    """Imports tqdm, whose first import in a notebook without ipywidgets warns of "IProgress not found".

    transformers imports it for bars that we do not show; ours need no widgets. Call it before the first import of
    transformers.
    """
    if "tqdm.auto" not in sys.modules:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="IProgress not found")
            import tqdm.auto  # type: ignore[import-untyped]  # noqa: F401
