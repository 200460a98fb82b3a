"""Writes docs/reference/*.md: one entry for every public name, under the name by which it is used, and the papers page.

    python docs/reference.py            writes the pages
    python docs/reference.py --check    exits with 1 where a page is not as it would be written

The docstrings are read by mkdocstrings when the site is built; here only the names and their homes are looked up. The
papers page says of each published method what tests/papers checks of it, in that test's own words, and what it calls.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType

#: page -> (its title, the modules whose public names it shows). A module without __all__ shows what it defines.
PAGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "interp": ("interp", ("interp", "interp.results", "interp.conformance", "interp.cards")),
    "edits-metrics": ("interp.edits and interp.metrics", ("interp.edits", "interp.metrics")),
    "experts": ("interp.experts", ("interp.experts",)),
    "patching": ("interp.patching", ("interp.patching", "interp.patching.builders", "interp.patching.circuits")),
    "steering": ("steering", ("steering",)),
    "probes": ("probes", ("probes",)),
    "sae": ("interp.sae", ("interp.sae",)),
    "store": ("interp.store", ("interp.store",)),
    "monet": ("interp.monet", ("interp.monet",)),
    "corpora": ("interp.corpora", ("interp.corpora",)),
    "plots": ("interp.plots, interp.atlas and interp.report", ("interp.plots", "interp.atlas", "interp.report")),
}
HERE = Path(__file__).parent / "reference"


def names(module: ModuleType) -> list[str]:
    """The public names of a module: its __all__, or the functions and classes that it defines itself."""
    if hasattr(module, "__all__"):
        return [name for name in module.__all__ if not name.startswith("__")]
    own = (n for n, x in vars(module).items() if getattr(x, "__module__", None) == module.__name__)
    return [
        n
        for n in own
        if not n.startswith("_") and (inspect.isfunction(vars(module)[n]) or inspect.isclass(vars(module)[n]))
    ]


def home(module: ModuleType, name: str) -> str | None:
    """The dotted path at which mkdocstrings finds a name; None for a module or a plain value."""
    value = getattr(module, name)
    if inspect.ismodule(value):
        return None
    where = getattr(value, "__module__", None)
    if where is None or not where.startswith(("interp", "probes", "steering")) or not hasattr(value, "__qualname__"):
        return None
    return f"{where}.{value.__qualname__}"


def page(title: str, modules: tuple[str, ...]) -> str:
    """One reference page as Markdown."""
    out = [f"# {title}", "", "<!-- written by docs/reference.py; do not edit -->"]
    for path in modules:
        module = importlib.import_module(path)
        out += ["", f"## {path}" if len(modules) > 1 else "", *_prose(module)]
        plain = []
        for name in names(module):
            found = home(module, name)
            if found is None:
                plain.append(f"* `{path}.{name}`{_about(module, name)}")
            else:
                out += ["", f"::: {found}", "    options:", f'      heading: "{path.removeprefix("interp.")}.{name}"',
                        "      heading_level: 3"]  # fmt: skip
        out += ["", *plain] if plain else []
    return "\n".join(out).replace("\n\n\n", "\n\n").rstrip() + "\n"


def _prose(module: ModuleType) -> list[str]:
    """The module's docstring: it tells the method, with its equations laid out in plain text."""
    text = inspect.getdoc(module) or ""
    return ["", "```text", text, "```"] if text else []


def _about(module: ModuleType, name: str) -> str:
    value = getattr(module, name)
    if inspect.ismodule(value):
        return f": {(inspect.getdoc(value) or '').splitlines()[0]}"
    return f": `{', '.join(map(str, value))}`" if isinstance(value, tuple | list | dict) else f": `{value!r}`"


def papers(folder: Path) -> str:
    """The page of published methods, from the docstrings of tests/papers and the functions of ours that they use."""
    out = ["# Published methods", "", "<!-- written by docs/reference.py; do not edit -->", "",
           "What is checked of each paper, what that uses, and the test that does it (in `tests/papers`)."]  # fmt: skip
    for file in sorted(folder.glob("test_*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        title, _, rest = inspect.cleandoc(ast.get_docstring(tree) or "").partition("\n\n")
        title = re.sub(r"^[A-Z]+-\d+[.,:]?\s+", "", " ".join(title.split())).rstrip(".")
        used = ", ".join(f"`{one}`" for one in _used(tree))
        out += ["", f"## {title}", "", " ".join(rest.split()), "", f"{f'Uses {used}. ' if used else ''}`{file.name}`."]
    return "\n".join(out).replace("\n\n\n", "\n") + "\n"


def _used(tree: ast.Module) -> list[str]:
    """Functions and classes of ours that a file uses, in order, as one writes them after `from interp import ...`."""
    here: dict[str, str] = {}  # a name in the file -> the module of ours that it stands for
    found: dict[str, None] = {}
    for node in sorted((n for n in ast.walk(tree) if hasattr(n, "lineno")), key=lambda n: (n.lineno, n.col_offset)):
        if isinstance(node, ast.Import):
            here |= {one.asname or one.name: one.name for one in node.names if one.name in _OURS}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in _OURS:
            for one in node.names:
                if inspect.ismodule(_found(f"{node.module}.{one.name}")):
                    here[one.asname or one.name] = f"{node.module}.{one.name}"
                else:
                    found[f"{node.module}.{one.name}"] = None
        elif isinstance(node, ast.Attribute) and (path := _path(node)).partition(".")[0] in here:
            first, _, rest = path.partition(".")
            found[f"{here[first]}.{rest}"] = None
    plain = ("interp.load", "interp.Model")
    kept = [path for path in found if "._" not in path and path not in plain and _callable(_found(path))]
    return [path.removeprefix("interp.") if path.count(".") > 1 else path for path in kept]


_OURS = ("interp", "probes", "steering")


def _path(node: ast.expr) -> str:
    """`a.b.c` of an attribute of a plain name; of anything else nothing."""
    if isinstance(node, ast.Attribute):
        inner = _path(node.value)
        return f"{inner}.{node.attr}" if inner else ""
    return node.id if isinstance(node, ast.Name) else ""


def _found(path: str) -> object:
    """What a dotted path of ours stands for; None where it leads nowhere."""
    try:
        return importlib.import_module(path)
    except ImportError:
        home, _, name = path.rpartition(".")
        return getattr(_found(home), name, None) if home else None


def _callable(value: object) -> bool:
    return inspect.isfunction(value) or (inspect.isclass(value) and not issubclass(value, Exception))


def main() -> int:
    """Writes the pages, or compares them with what is there; gives the exit code."""
    check, stale = "--check" in sys.argv[1:], []
    sys.path.insert(0, str(HERE.parents[1]))
    pages = {name: page(title, modules) for name, (title, modules) in PAGES.items()}
    pages["papers"] = papers(HERE.parents[1] / "tests" / "papers")
    for name, text in pages.items():
        target = HERE / f"{name}.md"
        if check and (not target.is_file() or target.read_text(encoding="utf-8") != text):
            stale.append(target.name)
        elif not check:
            target.write_text(text, encoding="utf-8")
    if stale:
        sys.stderr.write(f"not as docs/reference.py writes them: {', '.join(stale)}\n")
    return 1 if stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
