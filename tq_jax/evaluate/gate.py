"""`tq-jax gate`: compile every supported kernel for six GPU generations, without a GPU."""

import dataclasses
import functools
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import typer
from rich.table import Table

from pallas_kernels._compat import TritonKernel, lower_for_cuda, triton_kernels
from pallas_kernels.decode import LogitOptions, TileConfig
from pallas_kernels.decode.config import default_config
from pallas_kernels.decode.layout import value_parts
from pallas_kernels.decode.pages import empty_pages
from pallas_kernels.decode.triton import attend_pages, padded_columns, stages_for, widest
from pallas_kernels.gate import ARCHITECTURES, Compiled, compile_for, missing
from tq_jax.evaluate.report import JsonTarget, open_console, progress_bar, write_json
from tq_jax.quantizer import QuantizerSpec

MOST_REGISTERS = 255
BATCH, PAGES, KV_HEADS, PAGE_SIZE = 2, 64, 2, 128
PLAIN = LogitOptions(scale=0.1)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A supported kernel.

    Attributes:
        name: What is special about it.
        key: Key quantizer.
        value: Value quantizer.
        group: Query heads a KV head.
        count: Query tokens.
        options: Logit options.
        bias: Whether logits are biased.
        precise: Whether queries and probabilities have two bytes.
    """

    name: str
    key: QuantizerSpec
    value: QuantizerSpec
    group: int = 4
    count: int = 1
    options: LogitOptions = PLAIN
    bias: bool = False
    precise: bool = False

    @property
    def config(self) -> TileConfig:
        """The tiles that `attend_pages` would choose."""
        key, value = self.key.format, self.value.format
        return default_config(
            PAGE_SIZE,
            columns=padded_columns(self.count * self.group),
            dim=self.key.dim,
            value_parts=len(value_parts(value)),
            precise=self.precise,
            bits=(widest(key), widest(value)),
        )

    @property
    def expected(self) -> tuple[str, ...]:
        """Instructions that the kernel must contain; bytes need no lookup, and a single stage no copies."""
        lookup = () if self.key.bits == self.value.bits == 8 else ("prmt",)
        pipelined = ("async",) if stages_for(self.key.format, self.config) > 1 else ()
        return ("mma", *lookup, *pipelined)


def kernels() -> Iterator[Kernel]:
    """Every supported format, head dim, mask and row count; not every combination."""
    spec = QuantizerSpec
    for bits in (1, 2, 3, 4, 8):
        for precise in (False, True):
            name = f"K{bits}/V{bits}{' precise' if precise else ''}"
            yield Kernel(name, spec(128, bits), spec(128, bits), precise=precise)
    for dim in (64, 80, 96, 192, 256):
        yield Kernel(f"K4/V4 dim {dim}", spec(dim, 4), spec(dim, 4))
        low = 2 if dim == 80 else 3
        yield Kernel(f"K{low}/V2 dim {dim}", spec(dim, low), spec(dim, 2))
    four, two = spec(128, 4), spec(128, 2, kind="group")
    for bits in (2.5, 3.5):
        yield Kernel(f"K{bits}/V{bits}", spec(128, bits), spec(128, bits))
    for bits in (1, 2, 3, 4):
        yield Kernel(f"prod {bits}, min-max 2", spec(128, bits, kind="prod"), two)
    yield Kernel("min-max 4", four, spec(128, 4, kind="group"))
    for group, count in ((1, 1), (8, 1), (16, 1), (4, 2), (4, 5), (4, 8)):
        yield Kernel(f"group {group}, {count} queries", four, four, group=group, count=count)
    everything = LogitOptions(scale=0.1, softcap=30.0, sliding_window=512)
    yield Kernel("window, soft-cap, bias", four, four, options=everything, bias=True)
    yield Kernel("window, soft-cap, bias, 5 queries", four, four, options=everything, bias=True, count=5)


def lower(kernel: Kernel) -> TritonKernel:
    """The kernel as Triton IR."""
    key, value = kernel.key.format, kernel.value.format
    shape = jax.ShapeDtypeStruct
    pages = jax.eval_shape(lambda: empty_pages(BATCH * PAGES, KV_HEADS, PAGE_SIZE, key, value))
    query = shape((BATCH, kernel.count, KV_HEADS * kernel.group, kernel.key.dim), jnp.float32)

    def run(query: Any, pages: Any, table: Any, lengths: Any, positions: Any, bias: Any, sketch: Any) -> Any:
        return attend_pages(
            query,
            pages,
            table,
            lengths,
            positions=positions,
            key_format=key,
            value_format=value,
            options=kernel.options,
            logit_bias=bias,
            sketch_query=sketch,
            config=kernel.config,
            interpret=False,
        )

    integers = [shape(s, jnp.int32) for s in ((BATCH, PAGES), (BATCH,), (BATCH, kernel.count))]
    bias = shape(query.shape[:3], jnp.float32) if kernel.bias else None
    sketch = query if kernel.key.kind == "prod" else None
    lowered, _ = triton_kernels(lower_for_cuda(run, query, pages, *integers, bias, sketch))
    return lowered


def make_row(kernel: Kernel, architecture: str, compiled: Compiled) -> dict[str, Any]:
    """One row of the report."""
    lacking = missing(compiled, kernel.expected)
    fits = compiled.registers <= MOST_REGISTERS and not compiled.stack_bytes
    config = kernel.config
    return {
        "kernel": f"decode {kernel.name}",
        "config": f"{config.tile} tokens, {config.num_warps} warps, {config.num_stages} stages",
        "arch": architecture,
        "registers": compiled.registers,
        "spill_bytes": compiled.stack_bytes,
        "shared_bytes": compiled.shared_bytes,
        "instructions": compiled.instructions,
        "missing": lacking,
        "ok": fits and not lacking,
    }


def gate(
    arch: Annotated[str, typer.Option(help="Architectures, comma-separated.")] = ",".join(ARCHITECTURES),
    only: Annotated[str, typer.Option(help="Compile only kernels whose name contains this.")] = "",
    workers: Annotated[int, typer.Option(help="Compilers at a time; one a core by default.", min=0)] = 0,
    json: JsonTarget = None,
) -> None:
    """Compile every supported kernel for six GPU generations, without a GPU.

    Exits 0 only if each compiles without spilling registers and with the tensor-core, lookup and asynchronous-copy
    instructions it is made of. Needs the triton package.
    """
    console = open_console(json)
    chosen = [kernel for kernel in kernels() if only in kernel.name]
    rows = []
    # Fresh processes: neither JAX nor MLIR survives a fork.
    context = multiprocessing.get_context("spawn")
    with progress_bar(console) as progress, ProcessPoolExecutor(workers or os.cpu_count(), mp_context=context) as pool:
        task = progress.add_task("compiling", total=len(chosen) * len(arch.split(",")))
        jobs = {}
        for kernel in chosen:
            lowered = lower(kernel)
            for name in arch.split(","):
                jobs[pool.submit(functools.partial(compile_for, lowered, name))] = kernel, name
        for job in as_completed(jobs):
            kernel, name = jobs[job]
            rows.append(make_row(kernel, name, job.result()))
            progress.advance(task)
    rows.sort(key=lambda row: (row["kernel"], ARCHITECTURES.index(row["arch"])))
    table = Table(title="Decode kernels, compiled", title_justify="left")
    for column in ("kernel", "config", "arch", "registers", "spill_bytes", "shared_bytes", "ok"):
        table.add_column(column, justify="left" if column in ("kernel", "config", "arch") else "right")
    for row in rows:
        table.add_row(*(str(row[column.header]) for column in table.columns), style=None if row["ok"] else "red")
    console.print(table)
    console.print(f"{sum(row['ok'] for row in rows)} of {len(rows)} compile as they should")
    write_json({"rows": rows}, json)
    if not rows or not all(row["ok"] for row in rows):
        raise typer.Exit(1)
