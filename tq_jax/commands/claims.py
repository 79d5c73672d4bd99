"""Claims: a measured figure, the bound it is held to, and a verdict."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from tq_jax.commands.output import open_console, progress_bar, write_json


@dataclasses.dataclass(frozen=True)
class Claim:
    """One measured claim.

    Attributes:
        name: What is claimed.
        figure: The measured figure.
        relation: Relation that must hold between figure and bound.
        bound: The limit.
        judgement: The verdict if the figure keeps the bound.
        note: One line on how the figure was measured and what follows from it.
        details: Further figures of the same measurement.
    """

    name: str
    figure: float
    relation: Literal["<=", ">="]
    bound: float
    judgement: str = "pass"
    note: str = ""
    details: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether the figure keeps the bound; NaN never does."""
        return bool(self.figure <= self.bound if self.relation == "<=" else self.figure >= self.bound)

    @property
    def verdict(self) -> str:
        """The judgement, or "FAIL" if the figure does not keep the bound."""
        return self.judgement if self.ok else "FAIL"

    def as_dict(self) -> dict[str, Any]:
        """The claim as plain data.

        Example:
            >>> Claim("bias", 0.0004, "<=", 0.001).as_dict()["verdict"]
            'pass'
        """
        fields = {"name": self.name, "figure": self.figure, "relation": self.relation, "bound": self.bound}
        return fields | {"ok": self.ok, "verdict": self.verdict, "note": self.note, "details": self.details}


Check = Callable[[], Sequence[Claim]]
"""Measures some claims; the first line of its docstring is its label on the progress bar."""


def measure(checks: Sequence[Check], console: Console) -> list[Claim]:
    """Runs checks one after the other behind a progress bar.

    Args:
        checks: Checks to run.
        console: Where to show progress.

    Returns:
        All claims, in order.
    """
    claims: list[Claim] = []
    with progress_bar(console) as progress:
        task = progress.add_task("", total=len(checks))
        for check in checks:
            progress.update(task, description=(check.__doc__ or check.__name__).splitlines()[0].rstrip("."))
            claims += check()
            progress.advance(task)
    return claims


def conclude(
    title: str, checks: Sequence[Check], json_target: str | None, *, payload: dict[str, Any] | None = None
) -> None:
    """Runs a command that consists of checks: measures, prints the table, writes the JSON.

    Args:
        title: Heading of the table.
        checks: Checks to run.
        json_target: Value of the `--json` option.
        payload: What else the JSON holds; the checks may add to it.

    Raises:
        typer.Exit: With code 1 if a claim does not hold.
    """
    console = open_console(json_target)
    claims = measure(checks, console)
    console.print(_table(title, claims))
    failed = [claim.name for claim in claims if not claim.ok]
    console.print(f"{len(claims) - len(failed)} of {len(claims)} hold" + "".join(f"\n  FAIL {name}" for name in failed))
    write_json({"claims": [claim.as_dict() for claim in claims]} | (payload or {}), json_target)
    if failed:
        raise typer.Exit(1)


def _table(title: str, claims: Sequence[Claim]) -> Table:
    table = Table(title=title, title_justify="left", show_lines=any(claim.note for claim in claims))
    table.add_column("claim")
    table.add_column("measured", justify="right", no_wrap=True)
    table.add_column("bound", justify="right", no_wrap=True)
    table.add_column("verdict", style="bold", min_width=12, max_width=20)
    for claim in claims:
        name = claim.name + (f"\n[dim]{claim.note}[/dim]" if claim.note else "")
        bound = f"{claim.relation} {claim.bound:.4g}"
        table.add_row(name, f"{claim.figure:.4g}", bound, claim.verdict, style="" if claim.ok else "red")
    return table
