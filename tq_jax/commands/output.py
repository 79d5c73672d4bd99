"""The output of commands: tables and progress for a reader, one JSON object for a program, where figures come from."""

import contextlib
import json
import math
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

WIDTH_OF_FILES = 120
"""Width of tables, in characters, if the output is not a terminal."""

SECONDS_BETWEEN_LINES = 30.0
"""Least time between two lines that say how far a run without a terminal is."""

PACKAGES = ("tq-jax", "jax", "jaxlib", "torch", "triton", "transformers", "vllm", "flashinfer-python")
"""Packages whose versions are written beside figures."""


def open_console(target: str | None) -> Console:
    """The console for tables and progress: standard error if the JSON goes to standard output.

    Args:
        target: Value of the `--json` option.
    """
    console = Console(stderr=target == "-")
    if not console.is_terminal:
        console.width = WIDTH_OF_FILES
    return console


class Lines(Progress):
    """Progress where there is no terminal: now and then a line on standard error."""

    def __init__(self, console: Console) -> None:
        super().__init__(console=console, disable=True)
        self._said = time.monotonic()

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """Counts steps of a task; see `Progress.advance`."""
        super().advance(task_id, advance)
        task, now = self._tasks[task_id], time.monotonic()
        if now - self._said >= SECONDS_BETWEEN_LINES:
            self._said = now
            typer.echo(f"{task.completed:g} of {task.total:g}: {task.description}", err=True)


def progress_bar(console: Console) -> Progress:
    """A progress bar that vanishes when the work is done; lines on standard error if the console is no terminal.

    Args:
        console: Where to draw it.
    """
    if not console.is_terminal:
        return Lines(console)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)


def part_path(path: Path) -> Path:
    """Path of the temporary file that replaces a file once it is complete."""
    return path.with_name(f".{path.name}.part")


def write_json(payload: dict[str, Any], target: str | None) -> None:
    """Writes one JSON object, with each list of numbers on one line; NaN and infinities become null.

    Args:
        payload: Plain data; arrays and numpy scalars are written as lists and numbers.
        target: A path, "-" for standard output, or None to write nothing.

    Example:
        >>> write_json({"figure": float("nan"), "ok": True}, "-")
        {"figure": null, "ok": true}
    """
    if target is None:
        return
    text = json.dumps(_plain(payload), allow_nan=False, indent=None if target == "-" else 2)
    text = re.sub(r"\[\n[-+\d.eE,\s]*\]", lambda numbers: " ".join(numbers[0].split()), text)
    if target == "-":
        typer.echo(text)
    else:
        # A link, such as /dev/stdout, stays a link.
        path = Path(target).resolve() if Path(target).is_file() else Path(target)
        # Rows that took hours must survive a run that is killed while it writes.
        scratch = part_path(path) if path.is_file() else path
        scratch.write_text(text + "\n", encoding="utf-8")
        if scratch != path:
            scratch.replace(path)


def write_partial(payload: dict[str, Any], rows: Sequence[dict[str, Any]], target: str | None) -> None:
    """Writes the rows of a run that is not complete, for `--resume`; nothing if the JSON goes to standard output.

    Args:
        payload: What the file says besides its rows.
        rows: Rows measured so far.
        target: Value of the `--json` option.
    """
    if target != "-":
        write_json(payload | {"rows": rows, "complete": False}, target)


def known_rows(target: str | None, expected: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of a run that was cut off, for `--resume`.

    Args:
        target: JSON file of the run; a file that does not exist has no rows.
        expected: Fields besides the rows that must agree, so that the rows are of the same kind.

    Raises:
        typer.BadParameter: If no file is given, or the file is damaged or comes from a different run.
    """
    if target in (None, "-"):
        raise typer.BadParameter(f"expected --resume with --json PATH, got --json {target}")
    path = Path(str(target))
    if not path.is_file():
        return []
    found = _read_report(path)
    plain = _plain(expected)
    other = {name: found.get(name) for name in plain if found.get(name) != plain[name]}
    if other:
        raise typer.BadParameter(f"expected {target} to be of { ({name: plain[name] for name in other}) }, got {other}")
    return found["rows"]


def _read_report(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"expected the JSON file of a run, got {path} ({error})") from error
    rows = found.get("rows") if isinstance(found, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise typer.BadParameter(f"expected the JSON file of a run, got {path} without rows")
    return found


def environment(device: str | None = None) -> dict[str, Any]:
    """Where figures come from: the device, the versions of installed packages, and the commit of the code.

    The environment variable TQ_JAX_COMMIT names the commit of a copy whose repository is not there or is another one.

    Args:
        device: Kind of the device; by default that of JAX, which takes memory of a GPU as soon as it is asked.
    """
    if device is None:
        import jax  # commands that only print help need not wait for it

        device = jax.devices()[0].device_kind
    return {
        "device": f"{device}, {platform.machine()}, {os.cpu_count()} CPU cores",
        "versions": {"python": platform.python_version()} | versions(PACKAGES),
        "commit": os.environ.get("TQ_JAX_COMMIT") or _commit(),
    }


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of the packages that are installed; packages that are not installed are left out.

    Args:
        packages: Names as on PyPI.

    Example:
        >>> sorted(versions(["numpy", "no-such-package"]))
        ['numpy']
    """
    found = {}
    for name in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _commit() -> str:
    """The commit of this file's repository, marked if files differ from it; "" outside of a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    if shutil.which("git") is None:
        return ""
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()


def _plain(value: Any) -> Any:
    """The value with dicts, lists, and numbers that JSON can express."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
