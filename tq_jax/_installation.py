"""How this package is installed: its version, and whether `import interop` finds the bridges that belong to it."""

import importlib.util
import warnings
from importlib import metadata
from pathlib import Path

DISTRIBUTION = "tq-jax"
HOME = Path(__file__).parents[1]
"""The folder that holds `tq_jax` and should hold `interop`."""


def version() -> str:
    """The version of the installed distribution; "unknown" in a checkout that is not installed."""
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return "unknown"


def warn_if_interop_is_hidden(home: Path = HOME) -> None:
    """Warns if `import interop` would not find our bridges; imports nothing.

    `interop` is a common name: a folder of the user's project may stand before ours on `sys.path`, and the package of
    that name on PyPI is installed over ours.

    Args:
        home: The folder that should hold `interop`.

    Warns:
        RuntimeWarning: If another `interop` hides ours or has overwritten it. Silent if there is none.
    """
    ours = home / "interop"
    try:
        spec = importlib.util.find_spec("interop")
    except ValueError:  # a module that was made by hand has no spec
        return
    # A folder without __init__ has no origin: Python takes it only if no sys.path entry has a package of that name.
    if spec is None or spec.origin is None or not ours.is_dir():
        return
    found = Path(spec.origin)
    if not (found.parent.exists() and found.parent.samefile(ours)):
        problem = f"`import interop` finds {found}, which hides the bridges of {DISTRIBUTION} in {ours}"
        remedy = f"rename or uninstall the other one, or put {home} before it on sys.path"
    elif DISTRIBUTION not in (_source(spec.loader) or DISTRIBUTION):
        problem = f"`import interop` finds {found}, which another package wrote over the bridges of {DISTRIBUTION}"
        again = f"`pip install --force-reinstall --no-deps .` in a checkout of {DISTRIBUTION}"
        remedy = f"uninstall the other package, then {again}"
    else:
        return
    warnings.warn(f"{problem}: {remedy}", RuntimeWarning, stacklevel=3)


def _source(loader: object) -> str | None:
    """The text of `interop/__init__.py`; None if its loader has none."""
    read = getattr(loader, "get_source", None)
    return None if read is None else read("interop")
