"""How far `generate_many` is, how well its rows are used, and a bar that shows it."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


@dataclass(frozen=True)
class Tally:
    """Counts of a `generate_many` so far.

    Attributes:
        prompts: All prompts.
        finished: Prompts that are done, cancelled ones included.
        running: Prompts that have started and are not known to be done; more than the rows if some end in calls that
            the host has not read.
        new_tokens: New tokens read from the device.
        steps: Steps of decoding that ran.
        row_steps: These steps times the rows: the tokens that rows which are always busy would have drawn.
        used_row_steps: Row-steps that drew a token of a prompt that still wanted it.
    """

    prompts: int = 0
    finished: int = 0
    running: int = 0
    new_tokens: int = 0
    steps: int = 0
    row_steps: int = 0
    used_row_steps: int = 0

    @property
    def waiting(self) -> int:
        """Prompts that have no row yet."""
        return self.prompts - self.finished - self.running

    @property
    def use(self) -> float:
        """Used row-steps per row-step; 1 before the first step."""
        return self.used_row_steps / self.row_steps if self.row_steps else 1.0


class Bar:
    """A progress bar on standard error that vanishes when all prompts are done; nothing if that is no terminal."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        # No thread draws, so that nothing goes on if the caller drops the generation half-way.
        self._bar = Progress(
            *columns, console=console, transient=True, disable=not console.is_terminal, auto_refresh=False,
            redirect_stdout=False, redirect_stderr=False,
        )  # fmt: skip
        self._task: TaskID | None = None

    def __call__(self, tally: Tally) -> None:
        """Show the counts.

        Args:
            tally: The counts.
        """
        if self._task is None:
            self._bar.start()
            self._task = self._bar.add_task("", total=tally.prompts)
        self._bar.update(
            self._task, completed=tally.finished, description=f"{tally.new_tokens} tokens, rows used {tally.use:.0%}"
        )
        self._bar.refresh()

    def close(self) -> None:
        """Remove the bar; the next counts draw it again."""
        if self._task is not None:
            self._bar.stop()
            self._bar.remove_task(self._task)
            self._task = None
