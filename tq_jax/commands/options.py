"""Options that several commands share: their types, and checks that run before the work starts."""

import contextlib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from tq_jax.commands.output import part_path
from tq_jax.quantizer import FRACTIONAL_BITS, INTEGER_BITS

Number = TypeVar("Number", int, float)

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
"""Name of the model that is used if `--model` is not given."""

BITS = frozenset(map(float, INTEGER_BITS + FRACTIONAL_BITS))
"""Bits per channel that keys and values of a cache can have."""

LABELS_NAMED = 8
"""Most labels that an error message gives as examples."""

LATEX = {"pgf"}
"""Picture formats that matplotlib writes only with the help of an external program."""


@contextlib.contextmanager
def refusing(extra: str) -> Iterator[None]:
    """Turns errors that the user can fix (a wrong file or option, a missing package) into one sentence and exit code 2.

    Args:
        extra: The extra of this package that installs the package that may be missing.

    Raises:
        typer.BadParameter: If the block raises an ImportError, OSError, ValueError or NotImplementedError, or
            `safetensors` cannot read a file.
    """
    try:
        yield
    except ImportError as error:
        raise typer.BadParameter(f'{error}: pip install -e ".[{extra}]" in a checkout of tq-jax') from error
    except (OSError, ValueError, NotImplementedError) as error:
        raise typer.BadParameter(str(error)) from error
    except Exception as error:  # the error of safetensors, which may not be installed, is a bare Exception
        if type(error).__name__ != "SafetensorError":
            raise
        raise typer.BadParameter(f"a file of weights is damaged or cut off: {error}") from error


def require_writable(path: Path) -> None:
    """Rejects a path that cannot be written, before the work is done instead of after it.

    Raises:
        typer.BadParameter: If the path is a folder, or in no folder, or writing it is not allowed.
    """
    try:
        _try_to_write(path)
    except OSError as error:
        raise typer.BadParameter(
            f"expected a file that can be written, in an existing folder, got {path} ({error.strerror})"
        ) from error


def _try_to_write(path: Path) -> None:
    """Opens a file for writing and leaves it as it was; its permissions alone do not tell whether writing works."""
    if path.is_file() or path.is_dir():
        path.open("ab").close()
    elif not path.exists():  # a pipe or a device may be opened once
        path.open("xb").close()
        path.unlink()


def _writable(target: str | None) -> str | None:
    """Rejects a `--json` file that cannot be written or replaced."""
    if target not in (None, "-"):
        path = Path(str(target))
        require_writable(path)
        if not path.exists() or path.is_file():
            require_writable(part_path(path.resolve()))
    return target


def _writable_path(path: Path | None) -> Path | None:
    """Rejects an output file that cannot be written."""
    if path is not None:
        require_writable(path)
    return path


def _drawable(path: Path | None) -> Path | None:
    """Rejects a picture that could not be drawn."""
    if path is None:
        return None
    with refusing("models"):
        from matplotlib.backend_bases import FigureCanvasBase  # optional, and slow to import
    known = sorted(FigureCanvasBase.get_supported_filetypes().keys() - LATEX)
    if path.suffix[1:].lower() not in known:
        raise typer.BadParameter(f"expected the name of a picture that ends in .{', .'.join(known)}, got {path}")
    require_writable(path)
    return path


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
"""Type of the `--json` option, which every command has."""

OutputFile = Annotated[
    Path | None,
    typer.Option(
        "-o",
        "--output",
        callback=_writable_path,
        help="File to write; by default beside the model or in the cache directory.",
    ),
]
"""Type of the `--output` option of commands that make a file for a model."""

ModelName = Annotated[
    str | None, typer.Option(help=f"GGUF file or Hugging Face directory; {DEFAULT_MODEL} by default.")
]
"""Type of the `--model` option."""

TextFile = Annotated[
    Path | None, typer.Option(help="A text file; *Persuasion* by default.", exists=True, dir_okay=False)
]
"""Type of the `--text` option."""

Resume = Annotated[bool, typer.Option("--resume", help="Keep the rows that the --json file already has.")]
"""Type of the `--resume` option; see `tq_jax.commands.output.known_rows`."""


def picture_option(what: str) -> Any:
    """The option for the path of a picture, to annotate a `Path` with.

    Args:
        what: What the picture shows.
    """
    return typer.Option(callback=_drawable, help=f"Where to draw {what}; the suffix sets the format.")


def require_unset(reason: str, **options: Any) -> None:
    """Rejects options that would have no effect.

    Args:
        reason: Why they would have none, for the message.
        **options: Their values; None and False for those that are not set.

    Raises:
        typer.BadParameter: If one of them is set.

    Example:
        >>> require_unset("without --task", items=None)
    """
    for name, value in options.items():
        if value is not None and value is not False:
            raise typer.BadParameter(f"expected no --{name.replace('_', '-')} {reason}, got {value}")


def require_known(names: Sequence[str], known: Iterable[str], what: str) -> list[str]:
    """Rejects names that do not exist.

    Args:
        names: Names from an option.
        known: Every name that exists.
        what: What the names are of, in the plural.

    Returns:
        The names.

    Raises:
        typer.BadParameter: If a name is unknown.

    Example:
        >>> require_known(["b"], ["a", "b"], "letters")
        ['b']
    """
    there = list(known)
    unknown = [name for name in names if name not in there]
    if unknown:
        raise typer.BadParameter(f"expected {what} among {', '.join(there)}, got {', '.join(map(repr, unknown))}")
    return list(names)


def require_labels(labels: Iterable[str], only: str) -> None:
    """Rejects a value of `--only` that no label contains.

    Args:
        labels: Every label.
        only: Value of the option.

    Raises:
        typer.BadParameter: If no label contains the value; the message names some labels.
    """
    there = list(labels)
    if not any(only in label for label in there):
        some = "; ".join(there[:: len(there) // LABELS_NAMED + 1])
        raise typer.BadParameter(f"expected a part of a label such as {some} for --only, got {only!r}")


def parse_numbers(text: str, kind: Callable[[str], Number]) -> list[Number]:
    """Parses the numbers of an option like "128,0".

    Args:
        text: Value of the option.
        kind: int or float.

    Raises:
        typer.BadParameter: If the text is not a list of numbers, or a number is negative or not finite.

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


def parse_object(text: str, option: str) -> dict[str, Any]:
    """Parses an option whose value is a JSON object.

    Args:
        text: Value of the option.
        option: Name of the option.

    Raises:
        typer.BadParameter: If the text is no JSON object.

    Example:
        >>> parse_object('{"seed": 1}', "--options")
        {'seed': 1}
    """
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise typer.BadParameter(f"expected {option} to be a JSON object, got {text!r}")
    return found


def parse_bits(text: str) -> list[tuple[float, float]]:
    """Parses pairs of key and value bits like "8/4,4/4".

    Raises:
        typer.BadParameter: If the text is not a list of pairs, or no cache supports such bits.

    Example:
        >>> parse_bits("8/4,3.5/2")
        [(8.0, 4.0), (3.5, 2.0)]
    """
    try:
        pairs = [tuple(float(part) for part in pair.split("/")) for pair in text.split(",")]
        pairs = [(key, value) for key, value in pairs]
    except ValueError:
        raise typer.BadParameter(f"expected key/value bits like 4/4,3/3, got {text!r}") from None
    if not BITS.issuperset(itertools.chain(*pairs)):
        known = ", ".join(f"{bits:g}" for bits in sorted(BITS))
        raise typer.BadParameter(f"expected key/value bits of {known}, got {text!r}")
    return pairs
