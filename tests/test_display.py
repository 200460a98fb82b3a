"""Rich output: every noun has HTML with what matters in it, escaped, and IPython is given it and left as it was."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import interp
import probes
import steering
from interp import display, experts, sae

HOSTILE = "<script>alert('x')</script>"


def tags(page: str) -> list[str]:
    """The elements of a page, as a parser finds them."""
    found: list[str] = []

    class Finder(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            found.append(tag)

    Finder().feed(page)
    return found


@pytest.fixture(scope="module")
def things() -> dict[str, Any]:
    m, moe = interp.load("tiny:llama"), interp.load("tiny:olmoe")
    for model in (m, moe):
        model.name = HOSTILE
    vector = steering.SteeringVector.of(m, {"resid_post[1]": torch.ones(32)}, method=HOSTILE, record={"why": HOSTILE})
    s = sae.SAE(torch.eye(6, 4), torch.zeros(4), torch.eye(6, 4), torch.zeros(6), sites=("resid_post[1]",),
                targets=("resid_post[1]",), metadata={"note": HOSTILE})  # fmt: skip
    fitted = probes.LinearProbe().fit(np.eye(4)[[0, 1] * 10], [HOSTILE, "b"] * 10)
    frame = pd.DataFrame({"layer": [1], "label": [HOSTILE]})
    frame.attrs = {"model": HOSTILE, "seed": 7}
    return {
        "Model": m, "Activations": moe.capture([[5, 6, 7]], ["resid_post[*]", "expert_out[1]"]),
        "ExpertSet": experts.ExpertSet(moe, {1: [6, 2]}, record={"rule": HOSTILE}), "SteeringVector": vector, "SAE": s,
        "Probe": fitted, "Table": frame,
    }  # fmt: skip


SHOWN = {
    "Model": ("resid_post", "d_model", "3", "0..2", "sites it lacks"),
    "Activations": ("expert_out[1]", "batch 1 x pos 3 x d_model 32", "3 tokens", "float32"),
    "ExpertSet": ("2 experts", "25.0%", "2, 6"),
    "SteeringVector": ("resid_post[1]", "5.66", "last | generated"),
    "SAE": ("6 of 4 dimensions", "standard", "resid_post[1]"),
    "Probe": ("LinearProbe", "1 x 4 features"),
    "Table": ("seed", "7", "settings"),
}


@pytest.mark.parametrize("name", SHOWN)
def test_a_noun_shows_what_it_is(things: dict[str, Any], name: str) -> None:
    page = display.html(things[name])
    for text in SHOWN[name]:
        assert text in page
    assert HOSTILE not in page
    assert "script" not in tags(page)
    assert "&lt;script&gt;" in page
    assert len(page) < 20_000


@pytest.mark.parametrize("name", [n for n in SHOWN if n not in ("Table", "Probe")])
def test_a_terminal_gets_one_clear_line(things: dict[str, Any], name: str) -> None:
    text = repr(things[name])
    assert text.startswith(name)
    assert len(text) < 300
    assert "\n" not in text


def test_what_has_no_html_is_named() -> None:
    with pytest.raises(TypeError, match="no HTML for a int; it shows Model, Activations"):
        display.html(3)


def test_ipython_shows_them_and_forgets_them(things: dict[str, Any]) -> None:
    """The extension as IPython loads it, on its real formatter; afterwards the formatter is as before."""
    from IPython.core.formatters import DisplayFormatter

    class Shell:
        display_formatter = DisplayFormatter()

    def shown(thing: Any) -> str | None:
        return Shell.display_formatter.format(thing, include=["text/html"])[0].get("text/html")

    before = shown(things["Table"])
    display.load_ipython_extension(Shell)
    for name in SHOWN:
        assert shown(things[name]) == display.html(things[name]), name
    display.unload_ipython_extension(Shell)
    assert shown(things["Table"]) == before


def test_sites_complete_within_quotes() -> None:
    """In IPython's own completer, for the sites that the models at hand have; nowhere else, and not after unloading."""
    from IPython.core.completer import provisionalcompleter
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell()
    shell.user_ns.update(m=interp.load("tiny:llama"), moe=interp.load("tiny:olmoe"))

    def offered(line: str) -> set[str]:
        with provisionalcompleter():
            return {c.text for c in shell.Completer.completions(line, len(line)) if c.type == "site"}

    assert not offered('m.capture(x, "resid_')
    for _ in range(2):  # loading it again changes nothing
        display.load_ipython_extension(shell)
    assert offered('m.capture(x, "resid_') == {"resid_pre[*]", "resid_mid[*]", "resid_post[*]"}
    assert offered("m.capture(x, ['z[0]', 'router") == {"router_logits[*]"}
    assert "logits" in offered('m.capture(x, "lo')
    assert not offered("resid_")
    display.unload_ipython_extension(shell)
    assert not offered('m.capture(x, "resid_')
