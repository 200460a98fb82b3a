"""Writes docs/reference/*.md: one entry for every public name, under the name by which it is used.

    python docs/reference.py            writes the pages
    python docs/reference.py --check    exits with 1 where a page is not as it would be written

The docstrings are read by mkdocstrings when the site is built; here only the names and their homes are looked up.
"""

from __future__ import annotations

import importlib
import inspect
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


def main() -> int:
    """Writes the pages, or compares them with what is there; gives the exit code."""
    check, stale = "--check" in sys.argv[1:], []
    sys.path.insert(0, str(HERE.parents[1]))
    for name, (title, modules) in PAGES.items():
        target, text = HERE / f"{name}.md", page(title, modules)
        if check and (not target.is_file() or target.read_text(encoding="utf-8") != text):
            stale.append(target.name)
        elif not check:
            target.write_text(text, encoding="utf-8")
    if stale:
        sys.stderr.write(f"not as docs/reference.py writes them: {', '.join(stale)}\n")
    return 1 if stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
