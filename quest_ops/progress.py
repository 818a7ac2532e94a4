"""Progress bars on stderr for the commands: rich bars behind the callbacks of load, fetch and generate."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


class ProgressBars:
    """A context in which bars are shown. At its end they vanish, or, where stderr is no terminal, are printed once.

    After an error they vanish in either case: it is told in one line."""

    def __init__(self):
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        console = Console(stderr=True)
        self._progress = Progress(*columns, console=console, transient=console.is_terminal)

    def __enter__(self) -> ProgressBars:
        return self

    def __exit__(self, error_type, *_) -> None:
        if error_type is not None:
            self._progress.live.transient = True
            self._progress.live.stop()
        self.stop()

    def stop(self) -> None:
        """Ends the display, before the end of the context too: what is told later is not shown."""
        if self._progress.live.is_started:
            self._progress.stop()

    def bytes(self, label: str) -> Callable[[int, int | None], None]:
        """A callback (done, total) in bytes; the bar appears with its first call. total None: not known yet."""
        tasks = []

        def update(done: int, total: int | None) -> None:
            if not tasks:
                tasks.append(self._add(f"{label}, MB", None))
            self._progress.update(tasks[0], completed=done // 10**6, total=total and total // 10**6)

        return update

    def phases(self, label: str) -> Callable[[str, int, int], None]:
        """A callback (phase, done, total) with a bar for each phase."""
        tasks = {}

        def update(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = self._add(f"{label}: {phase}", total)
            self._progress.update(tasks[phase], completed=done)

        return update

    def _add(self, description: str, total: int | None) -> TaskID:
        if not self._progress.tasks:  # the display starts with its first bar, so that without one nothing is printed
            self._progress.start()
        return self._progress.add_task(description, total=total)
