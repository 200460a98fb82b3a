"""Progress: it counts, appears late, only once, and is gone after an interrupt."""

from __future__ import annotations

import pytest

from interp import progress
from interp.progress import bar


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PATIENCE", -1.0)
    monkeypatch.setenv(progress.VARIABLE, "1")


def test_it_shows_what_is_done(impatient: None, capfd: pytest.CaptureFixture[str]) -> None:
    with bar("counting", total=3) as advance:
        advance(2)
        advance(1, "nearly there")
    out, err = capfd.readouterr()
    assert out == ""
    assert "counting" in err
    assert "3/3" in err
    assert "nearly there" in err
    assert progress._bars == []


def test_short_work_stays_quiet(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(progress.VARIABLE, "1")
    with bar("thinking") as advance:
        advance(1)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("wish", ["0", None])
def test_it_is_silent_when_nobody_looks(
    wish: str | None, impatient: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(progress.VARIABLE)
    if wish is not None:
        monkeypatch.setenv(progress.VARIABLE, wish)
    with bar("thinking") as advance:
        advance(1)
    assert capfd.readouterr() == ("", "")


def test_a_notebook_shows_it_without_widgets(impatient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is displayed below a cell, in order: an empty place, the bar as it grows, and nothing in the end."""
    import IPython.display

    shown: list[str] = []

    class Handle:
        def update(self, made: IPython.display.HTML) -> None:
            shown.append(str(made.data))

    monkeypatch.setattr(IPython.display, "display", lambda made, display_id: Handle())
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    with bar("count<ing>", total=4) as advance:
        advance(1)
        advance(3, "so & so")
    assert shown[-1] == ""
    assert "count&lt;ing&gt;" in shown[0]
    assert 'value="1" max="4"' in shown[0]
    assert "4 of 4" in shown[-2]
    assert "so &amp; so" in shown[-2]


def test_time_left_is_by_the_pace_so_far() -> None:
    assert "1:00, 3:00 left" in progress.in_html("x", 1, 4, 60.0)
    assert "1:00:00, 1:00:00 left" in progress.in_html("x", 5, 10, 3600.0)
    assert "left" not in progress.in_html("x", 5, None, 60.0)
    assert "left" not in progress.in_html("x", 0, 4, 60.0)


def test_one_bar_at_a_time(impatient: None, capfd: pytest.CaptureFixture[str]) -> None:
    with bar("outer", 2) as outer:
        with bar("inner", 1) as inner:
            inner(1)
            assert progress._bars[0].live is not None, "what runs inside brings the outer bar up"
        outer(2)
    err = capfd.readouterr().err
    assert "2/2" in err
    assert "inner" not in err


def test_an_interrupt_takes_it_away(impatient: None) -> None:
    def work() -> None:
        with bar("working", 5) as advance:
            advance(1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert progress._bars == []


def test_told_after_its_end(impatient: None) -> None:
    with bar("late", 2) as advance:
        pass
    advance(2)
    assert progress._bars == []
