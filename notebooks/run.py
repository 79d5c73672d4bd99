"""Run the notebooks from top to bottom and store their outputs.

    python notebooks/run.py                all notebooks
    python notebooks/run.py 01 06          notebooks whose names begin with 01 or 06
    python notebooks/run.py --check        run all notebooks and write nothing

The exit status is 1 if a cell raises. The claims of the notebooks are assertions, so a claim that fails raises.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

FOLDER = Path(__file__).parent
SECONDS_PER_CELL = 600
KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}


def choose(prefixes: Sequence[str]) -> list[Path]:
    """Notebooks whose names begin with one of the prefixes; all notebooks if there are no prefixes.

    Raises:
        SystemExit: If no name begins with one of the prefixes.
    """
    found = [path for path in sorted(FOLDER.glob("*.ipynb")) if path.name.startswith(tuple(prefixes) or "")]
    if not found:
        raise SystemExit(f"expected the beginnings of names of notebooks in {FOLDER.name}, got {', '.join(prefixes)}")
    return found


def execute(path: Path) -> nbformat.NotebookNode:
    """Run a notebook in its folder with a kernel of this Python, and return it with the outputs of all cells."""
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL})
    client = NotebookClient(
        notebook,
        timeout=SECONDS_PER_CELL,
        resources={"metadata": {"path": str(FOLDER)}},
        record_timing=False,
        extra_arguments=["--log-level=ERROR"],
    )
    client.execute()
    return notebook


def clean(notebook: nbformat.NotebookNode) -> None:
    """Remove outputs and metadata that differ between machines. Standard error of cells goes to the terminal."""
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL, "language_info": {"name": "python"}})
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({})
        if cell.cell_type != "code":
            continue
        for output in [output for output in cell.outputs if output.get("name") == "stderr"]:
            sys.stderr.write(output.text)
            cell.outputs.remove(output)
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                output.data.pop("text/plain", None)
                output.metadata = nbformat.from_dict({})


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="beginnings of the notebooks' names")
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(arguments)
    failed = []
    for path in choose(options.names):
        started = time.perf_counter()
        try:
            notebook = execute(path)
        except CellExecutionError as error:
            print(error, file=sys.stderr)
            failed.append(path.name)
            continue
        clean(notebook)
        if not options.check:
            nbformat.write(notebook, path)
        print(f"{path.name}: {time.perf_counter() - started:.0f} s", flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
