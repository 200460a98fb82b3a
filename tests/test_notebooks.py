"""Every notebook runs from top to bottom, and is committed without outputs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def needs(source: str) -> None:
    """Skips, with the reason, where what a notebook reads is not to be had."""
    from interp import corpora
    from interp.zoo.load import names

    for name in re.findall(r'interp\.load\("([\w-]+-mini)"\)', source):
        if name not in names():
            pytest.skip(f"{name} is not in data/models")
    if "corpora.load" in source:
        try:
            corpora.load("test", group="domain", max_bytes=1000)
        except corpora.CorpusError as error:
            pytest.skip(f"the corpus cannot be had here: {error}")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbclient
    import nbformat

    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # threads that wait for a busy core cost tenfold
    needs(path.read_text(encoding="utf-8").replace('\\"', '"'))
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert outputs
    assert not [output for output in outputs if output.output_type == "error"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_holds_no_outputs(path: Path) -> None:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert cells[0]["cell_type"] == "markdown"
    assert not [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")]
