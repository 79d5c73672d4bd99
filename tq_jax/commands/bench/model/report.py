"""What `tq-jax bench model` says: rows, lines over the context, what fits, and vLLM's lines beside them."""

from collections.abc import Sequence
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from tq_jax.commands.bench.job import Row
from tq_jax.commands.bench.model import fit, lab
from tq_jax.commands.bench.model import line as lines_of
from tq_jax.commands.bench.model.plan import Plan

OPS = ("model", "prompt", "many", "fit")
"""Operations in rows of whole models."""

COUNTED = (
    "Floor of a token: the weights (without an embedding that is not also the head) and the keys and values of the "
    "tokens in use, at the speed of a copy. Floor of a prompt: the matrices of all layers, both products of causal "
    "attention and one head, at the speed of a large bfloat16 product."
)
ON_A_CPU = (
    "A CPU computes in float32 here, and its copy also pays for the memory of the result: floors are a scale, no bound."
)


def tell(row: Row) -> str:
    """A row in one line.

    Args:
        row: Row of a whole model.

    Example:
        >>> tell({"op": "prompt", "s": 0.5, "over_floor": 1.25})
        '0.5 s, 1.25 of the floor'
        >>> tell({"op": "fit", "error": "out of memory", "fits": False})
        'does not fit: out of memory'
    """
    if "error" in row:
        return f"{'does not fit' if row.get('fits') is False else 'not measured'}: {row['error']}"
    if row["op"] == "many":
        return f"{row['tokens_per_s']:.0f} tokens/s, {row['over_full']:.2f} of a batch that is always full"
    time = f"{row['s']:g} s" if "s" in row else f"{row['us'] / 1e3:.3f} ms per token"
    return f"{time}, {row['over_floor']:.2f} of the floor" + (", fits" if row.get("fits") else "")


def add_summary(data: dict[str, Any], plan: Plan) -> None:
    """Adds lines over the context, vLLM's published lines, and what fits the device.

    Args:
        data: The command's JSON; gets "lines", "published_lines" and "fit".
        plan: What was measured.
    """
    rows, limit = data["rows"], lab.memory_stats().get("bytes_limit")
    data["lines"] = lines_of.fit_lines(rows)
    shown = lines_of.VLLM_SHAPE in plan.configs
    data["published_lines"] = lines_of.published_lines(jax.devices()[0].device_kind) if shown else []
    data["fit"] = fit.compute(rows, plan.configs, plan.kinds, limit, devices=plan.placement.devices) if limit else []


def show(data: dict[str, Any], console: Console) -> None:
    """Prints the tables.

    Args:
        data: The command's JSON after `add_summary`.
        console: Where to print.
    """
    rows = [row for row in data["rows"] if row["op"] in OPS]
    meshes = {str(row["mesh"]) for row in rows if "mesh" in row}
    where = f", mesh {' and '.join(sorted(meshes))}" if meshes else ""
    title = f"Whole models on {jax.devices()[0].device_kind}{where}: tokens of the compiled decode loop"
    for table in (
        tokens_table(rows, title),
        prompts_table(rows),
        many_table(rows),
        lines_table(data),
        fit_table(data["fit"]),
    ):
        if table.row_count:
            console.print(table)
    console.print(COUNTED)
    if jax.default_backend() == "cpu":
        console.print(ON_A_CPU)
    if not data["fit"]:
        console.print("What fits is not computed: nothing was measured, or the device does not say how much it holds")


def make_table(title: str, columns: Sequence[str], lines: Sequence[Sequence[Any]], *, words: int) -> Table:
    """A table whose first columns are words and whose other columns are numbers.

    Args:
        title: Heading.
        columns: Names of the columns.
        lines: Texts or numbers of each line.
        words: How many columns are words.
    """
    table = Table(title=title, title_justify="left")
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index < words else "right")
    for cells in lines:
        table.add_row(*map(str, cells))
    return table


def cache_name(row: Row) -> str:
    """The cache of a row as in tables.

    Example:
        >>> cache_name({"key": "mse4", "value": "mse2"}), cache_name({"key": "bf16", "value": "bf16"})
        ('K4/V2', 'bf16')
    """
    return "bf16" if row["key"] == "bf16" else f"K{row['key'][3:]}/V{row['value'][3:]}"


def tokens_table(rows: Sequence[Row], title: str) -> Table:
    """Time per token of each load and cache.

    Args:
        rows: Rows of whole models.
        title: Heading.
    """
    lines = []
    for row in rows:
        if row["op"] in ("prompt", "many"):
            continue
        place = [row["shape"], f"{row['batch']} x {row['seq']}", cache_name(row)]
        if "error" in row:
            lines.append([*place, "", "", "", "", "", tell(row)])
            continue
        numbers = [row["us"] / 1e3, row["floor_us"] / 1e3, row["over_floor"]]
        sizes = f"{row['tokens_per_s']:.0f}", f"{row['cache_bytes'] / 1e9:.2f}"
        note = f"compiled in {row['compile_s']} s" + (", fits" if row.get("fits") else "")
        lines.append([*place, *(f"{number:.2f}" for number in numbers), *sizes, note])
    columns = ("shape", "load", "cache", "ms per token", "floor", "of floor", "tokens/s", "cache GB", "")
    return make_table(title, columns, lines, words=3)


def prompts_table(rows: Sequence[Row]) -> Table:
    """Seconds per prompt.

    Args:
        rows: Rows of whole models.
    """
    lines = []
    for row in (row for row in rows if row["op"] == "prompt"):
        place = [row["shape"], f"{row['batch']} x {row['seq']}", cache_name(row)]
        if "error" in row:
            lines.append([*place, "", "", "", "", tell(row)])
            continue
        numbers = [f"{row['s']:.3f}", f"{row['floor_s']:.3f}", f"{row['over_floor']:.2f}", f"{row['tokens_per_s']:.0f}"]
        lines.append([*place, *numbers, f"compiled in {row['compile_s']} s"])
    columns = ("shape", "prompt", "cache", "s", "floor", "of floor", "tokens/s", "")
    return make_table("Prompts", columns, lines, words=3)


def many_table(rows: Sequence[Row]) -> Table:
    """Throughput of many mixed prompts.

    Args:
        rows: Rows of whole models.
    """
    lines = []
    for row in (row for row in rows if row["op"] == "many"):
        place = [row["shape"], row["batch"], cache_name(row)]
        if "error" in row:
            lines.append([*place, "", "", "", "", tell(row)])
            continue
        numbers = [row["prompts"], f"{row['tokens_per_s']:.0f}", f"{row['over_full']:.3f}", f"{row['used_rows']:.3f}"]
        lines.append([*place, *numbers, f"compiled in {row['compile_s']} s"])
    columns = ("shape", "rows", "cache", "prompts", "tokens/s", "of a full batch", "rows in use", "")
    return make_table("Many mixed prompts", columns, lines, words=3)


def lines_table(data: dict[str, Any]) -> Table:
    """Intercepts and slopes, vLLM's last.

    Args:
        data: The command's JSON after `add_summary`.
    """
    lines = []
    for row in data["lines"]:
        lines.append(([row["shape"], cache_name(row)], [*_per_thousand(row), *_per_thousand(row["floor"])]))
    for row in data["published_lines"] if lines else ():
        where = f"scaled to {row['scaled_to']} by bandwidth" if row["scaled_to"] else "one H100, published"
        lines.append(([f"{row['shape']}, vLLM, {where}", row["cache"]], [*_per_thousand(row), "", ""]))
    told = [[*texts, *(f"{x:.4f}" if x != "" else "" for x in numbers)] for texts, numbers in lines]
    columns = ("shape", "cache", "ms", "ms per 1,000 tokens", "floor, ms", "floor per 1,000")
    return make_table("A token of one sequence: intercept, and slope over the context", columns, told, words=2)


def _per_thousand(line: dict[str, Any]) -> tuple[float, float]:
    """Intercept, and slope per 1,000 tokens."""
    return line["intercept_ms"], line["slope_ms"] * 1e3


def fit_table(rows: Sequence[Row]) -> Table:
    """What fits, as computed.

    Args:
        rows: Rows of `fit.compute`.
    """
    lines = [
        [
            row["shape"],
            cache_name(row),
            *(f"{row[name] / 1e9:.2f}" for name in ("limit_bytes", "weights_bytes", "overhead_bytes", "room_bytes")),
            f"{row['batch']} x {row['batch_seq']}",
            f"1 x {row['context']}",
        ]
        for row in rows
    ]
    columns = ("shape", "cache", "limit GB", "weights", "overhead", "room", "largest batch", "longest context")
    return make_table("What fits, computed from measured memory", columns, lines, words=2)
