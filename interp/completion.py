"""Tab completion of sites in Jupyter and IPython, within quotes: ``m.capture(texts, "resid_<tab>``.

`interp.display` registers it; what is offered are the sites of the models that the notebook has in its variables. (The
keys of Activations, ``acts["<tab>``, complete without it.)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

#: The cursor stands in a string, behind the beginning of a name, which may be one of several with commas.
_BEGUN = re.compile(r"""["'](?:[^"']*,\s*)?([a-z][a-z0-9_]*)$""")


def sites(line: str, names: Mapping[str, Any]) -> tuple[str, list[str]]:
    """(the name begun before the cursor, patterns that go on from it); nothing outside a string.

    Args:
        line: the text up to the cursor.
        names: the variables; those that are Models say which sites there are.
    """
    from interp.model import Model

    found = _BEGUN.search(line)
    if found is None:
        return "", []
    begun = found[1]
    out: dict[str, None] = {}  # in order, each once
    for model in (value for value in list(names.values()) if isinstance(value, Model)):
        for row in model.map().to_dict("records"):
            if row["present"] and row["site"].startswith(begun):
                out[f"{row['site']}[*]" if row["layers"] else row["site"]] = None
    return begun, list(out)


def register(shell: Any) -> None:
    """Adds the completion to a shell, once; a shell without a completer of our kind is left alone."""
    completer = getattr(shell, "Completer", None)
    try:
        from IPython.core.completer import SimpleCompletion, context_matcher
    except ImportError:  # before IPython 8.6
        return
    if completer is None or any(getattr(m, "__name__", "") == _NAME for m in completer.custom_matchers):
        return

    @context_matcher()  # type: ignore[untyped-decorator, unused-ignore]
    def interp_sites(context: Any) -> Any:
        begun, found = sites(context.text_until_cursor, shell.user_ns)
        return {"completions": [SimpleCompletion(text=text, type="site") for text in found], "matched_fragment": begun}

    completer.custom_matchers.append(interp_sites)


def unregister(shell: Any) -> None:
    """Takes it away again."""
    completer = getattr(shell, "Completer", None)
    if completer is not None:
        kept = [m for m in completer.custom_matchers if getattr(m, "__name__", "") != _NAME]
        completer.custom_matchers[:] = kept


_NAME = "interp_sites"
