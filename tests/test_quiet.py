"""Silence while we call others: bars and warnings are off inside, as they were outside, after an error too."""

from __future__ import annotations

import logging
import subprocess
import sys
import warnings

import pytest
from transformers.utils import logging as hf_logging

from interp.quiet import import_tqdm, quiet


def test_bars_and_warnings_are_off_inside_and_as_before_outside() -> None:
    logger = logging.getLogger("transformers")
    before = hf_logging.is_progress_bar_enabled(), logger.level

    def interrupted() -> None:
        with quiet():
            assert not hf_logging.is_progress_bar_enabled()
            assert not logger.isEnabledFor(logging.WARNING)
            with quiet():  # a call inside a call
                pass
            assert not hf_logging.is_progress_bar_enabled()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (hf_logging.is_progress_bar_enabled(), logger.level) == before


def test_what_the_user_switched_off_stays_off() -> None:
    before = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        with quiet():
            pass
        assert not hf_logging.is_progress_bar_enabled()
    finally:
        if before:
            hf_logging.enable_progress_bar()


def test_the_filters_of_warnings_are_not_touched() -> None:
    before = list(warnings.filters)
    import_tqdm()
    assert warnings.filters == before


#: A kernel without ipywidgets, as tqdm finds it.
KERNEL = """
import sys, types, warnings
sys.modules["ipykernel.zmqshell"] = types.ModuleType("zmqshell")
sys.modules["ipywidgets"] = None
fake = types.ModuleType("IPython"); fake.get_ipython = lambda: None
sys.modules["IPython"] = fake
warnings.simplefilter("always")
"""


def test_a_kernel_without_widgets_is_not_told_of_them() -> None:
    def said(line: str) -> str:
        return subprocess.run([sys.executable, "-c", KERNEL + line], capture_output=True, text=True, check=True).stderr

    assert "IProgress not found" in said("import tqdm.auto")  # it would be
    assert said("from interp.quiet import import_tqdm; import_tqdm()") == ""
