"""The progress line of a run: loss, tokens per second, time left."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

if TYPE_CHECKING:
    from interp.monet.train.loop import Run

#: Seconds between lines where there is no terminal to draw a bar on.
QUIET = 60.0


class Progress:
    """Draws a bar on a terminal; elsewhere (a log file) writes a line a minute."""

    def __init__(self, run: Run, console: Console) -> None:
        self.console, self.began, self.told = console, (time.monotonic(), run.tokens_seen), 0.0
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[line]}"))
        self.bar = Bar(*columns, console=console, disable=not console.is_terminal)
        self.task = self.bar.add_task(run.settings.recipe, total=run.settings.steps, completed=run.step, line="")

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.bar.stop()

    def __call__(self, run: Run, numbers: dict[str, float]) -> None:
        now = time.monotonic()
        speed = (run.tokens_seen - self.began[1]) / max(1e-9, now - self.began[0])
        left = (run.settings.steps - run.step) * run.settings.batch * run.settings.context / max(1e-9, speed)
        line = (
            f"step {run.step}/{run.settings.steps}  loss {numbers['loss']:.3f}  {speed:,.0f} tokens/s  "
            f"{left // 3600:.0f}h{left % 3600 // 60:02.0f}m left"
        )
        self.bar.update(self.task, completed=run.step, line=line)
        if not self.console.is_terminal and now - self.told >= QUIET:
            self.told = now
            self.console.print(f"{run.settings.recipe}  {line}", highlight=False)
