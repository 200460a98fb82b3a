"""The documentation: every Python block of docs/ and the README runs, every public name is there, every link leads
somewhere, and the site builds without a warning.

Blocks run in order, those of a page in one namespace, in an empty directory. Three things stand in for what would take
minutes or the network: "smollm2" is a random Llama of its depth, a corpus is a few paragraphs, and the builder of IOI
pairs makes one. So what is tested is that the code runs as it is written, not the numbers it gives.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
RUN = [page for page in PAGES if "```python" in page.read_text(encoding="utf-8")]
FENCE = re.compile(r"^```python\n(.*?)^```", re.M | re.S)


def blocks(page: Path) -> list[tuple[int, str]]:
    """(line, code) of each Python block."""
    text = page.read_text(encoding="utf-8")
    return [(text.count("\n", 0, found.start(1)), found[1]) for found in FENCE.finditer(text)]


def run(code: str, page: Path, line: int, names: dict[str, Any]) -> None:
    """Runs a block; a traceback shows the page's own lines."""
    exec(compile("\n" * line + code, str(page), "exec"), names)


@pytest.fixture(scope="module")
def stand_in() -> Any:
    """A random Llama as deep as the pages' examples need, with a real tokenizer and a chat template."""
    import interp

    made = interp.load("monet-mini").tokenizer
    made.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "
    return interp.load(
        "tiny:llama", made, vocab_size=len(made), num_hidden_layers=21, max_position_embeddings=512
    )  # fmt: skip


@pytest.fixture
def cheap(stand_in: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What stands in for real models, corpora and pairs while a page runs."""
    import interp
    import steering
    from interp import corpora, patching
    from interp.demo_texts import PARAGRAPHS

    load, ioi, pairs = interp.load, patching.builders.ioi, steering.example_pairs
    labels = ("law", "maths", "python")
    few = {label: list(texts) * 2 for label, texts in zip(labels, PARAGRAPHS.values(), strict=False)}
    monkeypatch.setattr(interp, "load", lambda name, *a, **k: stand_in if name == "smollm2" else load(name, *a, **k))
    monkeypatch.setattr(corpora, "load", lambda *a, **k: few)
    monkeypatch.setattr(patching.builders, "ioi", lambda m, n=1, seed=0: ioi(m, 1, seed))
    monkeypatch.setattr(steering, "example_pairs", lambda name: pairs(name)[:18])
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("page", RUN, ids=lambda page: str(page.relative_to(DOCS)))
@pytest.mark.usefixtures("cheap")
def test_the_code_of_a_page_runs(page: Path) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    for line, code in blocks(page):
        run(code, page, line, names)


@pytest.fixture(scope="module")
def of_the_reader(stand_in: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the README's blocks speak of without defining it: texts, labels, pairs, activations of yours."""
    import numpy as np
    import torch

    import interp
    import steering
    from interp import store
    from interp.demo_texts import PARAGRAPHS

    texts, others = ((list(group) * 3)[:8] for group in list(PARAGRAPHS.values())[:2])
    ds = store.write(stand_in, texts, ["resid_post[15]"], tmp_path_factory.mktemp("ds") / "acts", progress=False)
    y = np.array([0, 1] * 20)
    names = {
        "interp": interp, "steering": steering, "m": stand_in, "texts": texts, "others": others, "ds": ds,
        "labels": ["a", "b"] * 4, "templates": list("aabbccdd"), "y": y,
        "X": np.random.default_rng(0).normal(size=(40, 8)) + y[:, None], "x": torch.randn(200, stand_in.d_model),
        "moe": interp.load("tiny:olmoe", stand_in.tokenizer, vocab_size=stand_in.d_vocab, max_position_embeddings=512),
    }  # fmt: skip
    for name in ("edits", "metrics", "experts", "patching", "sae", "store", "corpora"):
        names[name] = getattr(interp, name)
    return names


#: Blocks that ask for more than the stand-ins have; the pages of docs/ run the same calls at a smaller size.
TOO_LARGE = {
    "experts.split(m, n=16)": "the MLPs of the stand-in have 40 neurons, which 16 experts cannot share",
    "sae.train(ds": "it takes batches of 4,096 tokens",
    "probes.by_layer(m, texts": "it takes one label for each of the reader's texts",
    "store.write(m, texts": "it takes one label for each of the reader's texts",
}


@pytest.mark.parametrize(
    ("line", "code"), blocks(ROOT / "README.md"), ids=lambda x: f"line {x}" if isinstance(x, int) else ""
)
@pytest.mark.usefixtures("cheap")
def test_the_code_of_the_readme_runs(line: int, code: str, of_the_reader: dict[str, Any]) -> None:
    """Each block by itself, with a model of the reader's: headings in between begin anew."""
    for start, why in TOO_LARGE.items():
        if start in code:
            pytest.skip(f"not run on stand-ins: {why}")
    run(code, ROOT / "README.md", line, dict(of_the_reader))


def test_the_reference_shows_every_public_name() -> None:
    import interp
    import probes
    import steering

    spec = importlib.util.spec_from_file_location("reference", DOCS / "reference.py")
    assert spec is not None
    assert spec.loader is not None
    writer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(writer)
    for name, (title, modules) in writer.PAGES.items():
        written = (DOCS / "reference" / f"{name}.md").read_text(encoding="utf-8")
        assert written == writer.page(title, modules), f"{name}.md is stale: python docs/reference.py"
    closed = (DOCS / "reference" / "papers.md").read_text(encoding="utf-8")
    assert closed == writer.papers(DOCS.parent / "tests" / "papers"), "papers.md is stale: python docs/reference.py"
    shown = "\n".join(page.read_text(encoding="utf-8") for page in (DOCS / "reference").glob("*.md"))
    for module in (interp, probes, steering, *(getattr(interp, name) for name in interp._MODULES)):
        for name in getattr(module, "__all__", []):
            if not name.startswith("__"):
                assert re.search(rf"\b{name}\b", shown), f"{module.__name__}.{name} is in no reference page"


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as the table of contents makes them."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", head).strip().lower()) for head in heads}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        place = (page.parent / file).resolve() if file else page
        assert place.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(place), f"{page.name}: {target}"


def test_the_menu_holds_every_page() -> None:
    menu = set(re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.M))
    assert menu == {str(page.relative_to(DOCS)) for page in PAGES}


def defined(package: str, dotted: list[str]) -> bool:
    """True where the package's source has a class or function of each name in `dotted`. Nothing is imported."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    source = "\n".join(p.read_text(encoding="utf-8") for p in Path(str(spec.origin)).parent.rglob("*.py"))
    return all(re.search(rf"\b(class|def)\s+{name}\b", source) for name in dotted)


@pytest.mark.parametrize("package", ["transformer_lens", "nnsight", "sae_lens", "pyvene"])
def test_names_of_other_packages_are_theirs(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    text = (DOCS / "compare.md").read_text(encoding="utf-8")
    named = [found.split(".") for found in re.findall(rf"`{package}\.([\w.]+)", text)]
    assert named
    for dotted in named:
        assert defined(package, [part for part in dotted if part not in ("model_bridge", "patching")]), dotted


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """With Zensical, where it is installed, in strict mode: broken links and missing names are errors."""
    if importlib.util.find_spec("zensical") is None or importlib.util.find_spec("mkdocstrings") is None:
        pytest.skip("the site's builder is not installed: pip install -e '.[docs]'")
    for name in ("docs", "interp", "probes", "steering"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {p.relative_to(tmp_path / "site").with_suffix(".md") for p in (tmp_path / "site").rglob("*.html")}
    assert {page.relative_to(DOCS) for page in PAGES} <= pages
    shown = (tmp_path / "site" / "reference" / "experts.html").read_text(encoding="utf-8")
    assert "experts.ablate" in shown
    assert "fonts.googleapis" not in shown
