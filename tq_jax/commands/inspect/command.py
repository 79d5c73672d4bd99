"""`tq-jax inspect`: the content of a file of this package, and whether the file is sound."""

import dataclasses
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.table import Table

from tq_jax import store
from tq_jax.cache_spec import CacheSpec
from tq_jax.commands.options import JsonTarget, refusing
from tq_jax.commands.output import open_console, write_json
from tq_jax.files import Shapes, read_arrays, read_header
from tq_jax.search import store as index_store

BFLOAT16_BYTES = 2


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        expected: Names and shapes of the arrays, from the header.
        facts: Facts for a reader, from header and arrays.
    """

    expected: Callable[[dict[str, Any]], Shapes]
    facts: Callable[[dict[str, Any], dict[str, np.ndarray]], dict[str, Any]]


def inspect_file(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A cache, a search index or key statistics.")],
    target: JsonTarget = None,
) -> None:
    """Show what a saved cache, search index or file of key statistics holds, with the bytes of every array.

    Reads the whole file. Exits 0 only if header, names, types, shapes and every byte are as they were written.
    """
    console = open_console(target)
    with refusing("models"):
        importlib.import_module("safetensors")
    if target not in (None, "-") and file.resolve() == Path(str(target)).resolve():
        raise typer.BadParameter(f"expected --json to name another file than {file}")
    try:
        report = describe(file)
    except (FileNotFoundError, IsADirectoryError, ValueError) as error:
        write_json({"file": str(file), "ok": False, "verdict": str(error)}, target)
        console.print(f"[red]not sound[/]: {error}", highlight=False)
        raise typer.Exit(1) from error
    write_json(report, target)
    console.print(_table(report))
    for name, value in report["facts"].items():
        console.print(f"{name}: {value:,}" if isinstance(value, int) else f"{name}: {value}", highlight=False)
    console.print(f"[green]sound[/]: {report['verdict']}", highlight=False)


def describe(file: Path) -> dict[str, Any]:
    """The content of a file, as plain data.

    Args:
        file: The file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged or of an unknown format.
    """
    kind = _kind(file)
    header, arrays = read_arrays(file, kind.expected)
    rows = [
        {"name": name, "dtype": str(array.dtype), "shape": list(array.shape), "bytes": array.nbytes}
        for name, array in sorted(arrays.items())
    ]
    return {
        "file": str(file),
        "format": header["format"],
        "ok": True,
        "verdict": "header, shapes and every byte are as they were written",
        "bytes": file.stat().st_size,
        "spec": header.get("spec"),
        "facts": kind.facts(header, arrays),
        "arrays": rows,
    }


def _kind(file: Path) -> Kind:
    kinds = {
        store.CACHE_FORMAT: Kind(store.expected_cache, _cache_facts),
        store.STATISTICS_FORMAT: Kind(store.expected_statistics, _statistics_facts),
        index_store.FORMAT: Kind(index_store.expected_arrays, _index_facts),
    }
    found = read_header(file)["format"]
    if found not in kinds:
        raise ValueError(f"{file.name}: expected a format among {', '.join(map(repr, kinds))}, got {found!r}")
    return kinds[found]


def _cache_facts(header: dict[str, Any], arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    spec: CacheSpec = store.parse_cache(header)[0]
    length, compressed = arrays["length"], arrays["compressed"]
    stored = sum(array.nbytes for array in arrays.values())
    full = int(length.sum()) * 2 * spec.num_kv_heads * spec.head_dim * BFLOAT16_BYTES
    return {
        "rows": header["rows"],
        "tokens per row": _range(length),
        "of them compressed": _range(compressed),
        "keys and values": _widths(spec),
        "bytes of a compressed token": spec.bytes_per_token(),
        "bytes of all arrays": stored,
        "bytes of the same tokens in bfloat16": full,
        "times smaller": round(full / stored, 2) if stored else 0.0,
    }


def _index_facts(header: dict[str, Any], arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    by_vector = ("packed", "scale", "offset", "signs", "residual")
    each = sum(arrays[name].nbytes for name in by_vector if name in arrays) // max(header["count"], 1)
    spec = header["spec"]
    return {
        "vectors": header["count"],
        "dimensions": spec["dim"],
        "codes": f"{spec['kind']} {spec['bits']:g} bits, {spec['metric']}",
        "bytes of a vector": each,
        "bytes of a vector in float32": 4 * spec["dim"],
    }


def _statistics_facts(header: dict[str, Any], arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    layers, heads, dim = header["shape"]
    norms = np.linalg.norm(arrays["mean"], axis=-1)
    return {
        "layers": layers,
        "KV heads": heads,
        "channels of a head": dim,
        "norm of a mean key": f"{norms.min():.3g} to {norms.max():.3g}",
        "weight of a channel": f"{arrays['weight'].min():.3g} to {arrays['weight'].max():.3g}",
    }


def _widths(spec: CacheSpec) -> str:
    if spec.key is None or spec.value is None:
        return f"full precision ({spec.dtype})"
    return f"{spec.key.kind} {spec.key.bits:g} bits, {spec.value.kind} {spec.value.bits:g} bits"


def _range(counts: np.ndarray) -> str:
    if not counts.size:
        return "none"
    return str(counts.min()) if counts.min() == counts.max() else f"{counts.min()} to {counts.max()}"


def _table(report: dict[str, Any]) -> Table:
    table = Table("array", "type", "shape", title=f"{Path(report['file']).name}: {report['format']}")
    table.add_column("bytes", justify="right")
    for row in report["arrays"]:
        table.add_row(row["name"], row["dtype"], str(row["shape"]), f"{row['bytes']:,}")
    return table
