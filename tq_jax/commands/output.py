"""What commands share: options checked before the work, tables for a reader, one JSON object for a program."""

import contextlib
import json
import math
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

Number = TypeVar("Number", int, float)

WIDTH_OF_FILES = 120
"""Columns of tables that no terminal shows."""

LABELS_NAMED = 8
"""Most labels that a message gives as examples."""

PACKAGES = ("tq-jax", "jax", "jaxlib", "torch", "triton", "transformers", "vllm", "flashinfer-python")
"""Whose versions stand beside figures."""


@contextlib.contextmanager
def refusing(extra: str) -> Iterator[None]:
    """Says in one sentence, with exit code 2, what a user can mend: a wrong file or option, a missing package.

    Args:
        extra: The extra of this package that has what may be missing.

    Raises:
        typer.BadParameter: For an ImportError, OSError, ValueError or NotImplementedError in the block.
    """
    try:
        yield
    except ImportError as error:
        raise typer.BadParameter(f'{error}: pip install "tq-jax[{extra}]"') from error
    except (OSError, ValueError, NotImplementedError) as error:
        raise typer.BadParameter(str(error)) from error


def _require_writable(path: Path) -> None:
    """Rejects what cannot be written before the work is done, not after."""
    try:
        _try_to_write(path)
    except OSError as error:
        raise typer.BadParameter(
            f"expected a file that can be written, in an existing folder, got {path} ({error.strerror})"
        ) from error


def _try_to_write(path: Path) -> None:
    """Opens a file and leaves it as it was, or not there; its permissions alone do not say whether that works."""
    if path.is_file() or path.is_dir():
        path.open("ab").close()
    elif not path.exists():  # a pipe or a device may be opened once
        path.open("xb").close()
        path.unlink()


def _writable(target: str | None) -> str | None:
    if target not in (None, "-"):
        path = Path(str(target))
        _require_writable(path)
        if not path.exists() or path.is_file():
            _require_writable(_scratch(path.resolve()))
    return target


def _scratch(path: Path) -> Path:
    """Where a file is written that then takes the place of another."""
    return path.with_name(f".{path.name}.part")


JsonTarget = Annotated[
    str | None,
    typer.Option(
        "--json",
        metavar="PATH|-",
        callback=_writable,
        help="Write the printed figures as one JSON object to PATH, or with - to standard output; tables then go to "
        "standard error.",
    ),
]
"""Type of the `--json` option that every command has."""

LATEX = {"pgf"}
"""Formats that matplotlib writes only with a program that is not its own."""


def _drawable(path: Path | None) -> Path | None:
    """Rejects a picture that could not be drawn."""
    if path is None:
        return None
    with refusing("models"):
        from matplotlib.backend_bases import FigureCanvasBase  # optional, and slow to import
    known = sorted(FigureCanvasBase.get_supported_filetypes().keys() - LATEX)
    if path.suffix[1:].lower() not in known:
        raise typer.BadParameter(f"expected the name of a picture that ends in .{', .'.join(known)}, got {path}")
    _require_writable(path)
    return path


def picture_option(what: str) -> Any:
    """The option for the path of a picture, for an annotation of Path.

    Args:
        what: What is drawn.
    """
    return typer.Option(callback=_drawable, help=f"Where to draw {what}; the suffix says in which format.")


def require_labels(labels: Iterable[str], only: str) -> None:
    """Rejects an `--only` that leaves nothing.

    Args:
        labels: What there is.
        only: Value of the option.

    Raises:
        typer.BadParameter: If no label has it in it; some of the labels are named.
    """
    there = list(labels)
    if not any(only in label for label in there):
        some = "; ".join(there[:: len(there) // LABELS_NAMED + 1])
        raise typer.BadParameter(f"expected a part of a label such as {some} for --only, got {only!r}")


def parse_numbers(text: str, kind: Callable[[str], Number]) -> list[Number]:
    """Numbers of an option like "128,0".

    Args:
        text: Its value.
        kind: int or float.

    Raises:
        typer.BadParameter: If the text is something else, or a number is negative or not finite.

    Example:
        >>> parse_numbers("0.5,1", float)
        [0.5, 1.0]
    """
    try:
        found = [kind(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 <= number < math.inf for number in found):
        raise typer.BadParameter(f"expected comma-separated numbers of at least 0, got {text!r}")
    return found


def open_console(target: str | None) -> Console:
    """The console for tables and progress: standard error when JSON takes standard output.

    Args:
        target: Value of the `--json` option.
    """
    console = Console(stderr=target == "-")
    if not console.is_terminal:
        console.width = WIDTH_OF_FILES
    return console


def progress_bar(console: Console) -> Progress:
    """A progress bar that vanishes when the work is done.

    Args:
        console: Where to draw it.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def write_json(payload: dict[str, Any], target: str | None) -> None:
    """Writes one JSON object, lists of numbers on one line; numbers that JSON cannot say (NaN, infinities) become null.

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
        # A link, such as /dev/stdout, stays one.
        path = Path(target).resolve() if Path(target).is_file() else Path(target)
        # Rows of hours shall survive an end in the middle of writing.
        scratch = _scratch(path) if path.is_file() else path
        scratch.write_text(text + "\n", encoding="utf-8")
        if scratch != path:
            scratch.replace(path)


def known_rows(target: str | None, expected: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of a run that was cut off, for `--resume`.

    Args:
        target: Its JSON file; one that does not exist holds none.
        expected: What the file must say besides its rows, for them to be of the same kind.

    Raises:
        typer.BadParameter: If there can be no file, or it is damaged or of another run.
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


def environment() -> dict[str, Any]:
    """Where figures come from: device, versions of what is installed, and the commit that the code is of.

    The commit of a copy without its repository is that of the environment variable TQ_JAX_COMMIT; "" if nobody knows.
    """
    import jax  # commands that only print help need not wait for it

    return {
        "device": f"{jax.devices()[0].device_kind}, {platform.machine()}, {os.cpu_count()} CPU cores",
        "versions": {"python": platform.python_version()} | versions(PACKAGES),
        "commit": _commit() or os.environ.get("TQ_JAX_COMMIT", ""),
    }


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of those packages that are installed.

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
    """The commit of this file's repository, marked if files differ from it; "" outside of one."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    if shutil.which("git") is None:
        return ""
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
