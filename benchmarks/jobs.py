"""Named measurements, run one after the other: each prints its row, and the file is written after every row."""

import argparse
import json
import os
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any

from tq_jax.commands.output import environment, write_json

Jobs = dict[str, Callable[[], dict[str, Any]]]
"""Functions that measure a row each, by the name of the row."""


def prepare() -> None:
    """Lets torch and other processes allocate on the GPU of JAX, which must not have started yet."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    warnings.filterwarnings("ignore", message="The Pallas Triton backend is deprecated")


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options of `run`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--only", default="", help="run jobs with this text in their names; several divided by |")
    parser.add_argument("--limit", type=float, default=float("inf"), help="start nothing new after so many seconds")
    parser.add_argument("--json", help="where to write the results")
    return parser


def run(jobs: Jobs, options: argparse.Namespace, **about: Any) -> bool:
    """Runs the chosen jobs.

    Args:
        jobs: All jobs.
        options: What the parser found.
        **about: What stands in the file beside the device, the versions and the commit.

    Returns:
        Whether there was a row and no job failed.
    """
    end, rows = time.monotonic() + options.limit, []
    chosen = [name for name in jobs if any(text in name for text in options.only.split("|"))]
    for name in chosen:
        started = time.monotonic()
        if started > end:
            break
        try:
            row = jobs[name]()
        except Exception as error:
            traceback.print_exc()
            row = {"error": f"{type(error).__name__}: {error}"[:400]}
        rows.append({"case": name} | row | {"seconds": round(time.monotonic() - started, 1)})
        print(json.dumps(rows[-1]), flush=True)
        write_json(environment() | about | {"rows": rows}, options.json)
    print(f"{len(rows)} of {len(chosen)} measured")
    return bool(rows) and not any("error" in row for row in rows)
