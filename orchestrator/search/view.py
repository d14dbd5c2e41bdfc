"""What a person sees of a search: a bar per phase on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from orchestrator.view import clock

_LINE_SECONDS = 20.0


class SearchView:
    """Told of windows that were run, phase by phase."""

    def __init__(self, console: Console) -> None:
        """Show on this console."""
        self._console = console
        self._bar: Progress | None = None
        self._done, self._total, self._note, self._name = 0, 0, "", ""
        self._began = self._last = time.monotonic()

    def say(self, line: str) -> None:
        """A line that stays."""
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def phase(self, name: str, total: int) -> Iterator[None]:
        """A phase of so many windows, which may end sooner.

        Args:
            name: "sensitivity", "3.6 bits".
        """
        self._name, self._done, self._total, self._note = name, 0, total, ""
        self._began = self._last = time.monotonic()
        if not self._console.is_terminal:
            self.say(f"{name}: up to {total} windows to run")
            yield
            self.say(f"{name}: {self._done} windows in {clock(time.monotonic() - self._began)}{self._noted()}")
            return
        columns = (
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed:.0f}/{task.total:.0f} windows"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=self._console, expand=True) as bar:
            self._bar, self._task = bar, bar.add_task(name, total=total, note="")
            try:
                yield
            finally:
                bar.update(self._task, total=max(1, self._done))
                self._bar = None

    def ran(self, windows: int) -> None:
        """So many windows more."""
        self._done += windows
        if self._bar is not None:
            self._bar.update(self._task, advance=windows)
        elif time.monotonic() - self._last > _LINE_SECONDS and self._total:
            self._last = time.monotonic()
            passed = clock(self._last - self._began)
            self.say(f"{self._name}: {self._done}/{self._total} windows, {passed}{self._noted()}")

    def note(self, text: str) -> None:
        """What is best by now."""
        self._note = text
        if self._bar is not None:
            self._bar.update(self._task, note=text)

    def _noted(self) -> str:
        return f"; {self._note}" if self._note else ""
