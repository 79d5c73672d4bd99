"""Decode attention on a GPU: parity of every variant with the reference, and the time of tile configurations.

    python benchmarks/decode.py --limit 500 --json decode.json

Against the memory floor and peers, `tq-jax bench decode` measures.
"""

import argparse
import dataclasses
import functools
import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
warnings.filterwarnings("ignore", message="The Pallas Triton backend is deprecated")

import jax
import jax.numpy as jnp

from benchmarks.variants import VARIANTS, Variant, make_case, relative_error
from pallas_kernels.decode import TileConfig, decode_attention, triton
from tq_jax.bench import timing
from tq_jax.bench.command import COPY_BYTES
from tq_jax.bench.decode import MSE, Case, run_case
from tq_jax.bench.job import Job, Row, Setting
from tq_jax.bench.shapes import DECODE
from tq_jax.evaluate.report import environment, write_json

CONFIGS = [
    TileConfig(tile=tile, num_warps=warps, num_stages=stages, programs=132 * per_sm)
    for tile, warps, stages, per_sm in (
        (64, 1, 3, 12),
        (64, 1, 2, 12),
        (64, 1, 3, 10),
        (64, 1, 4, 12),
        (64, 1, 3, 24),
        (128, 2, 3, 6),
        (128, 2, 2, 6),
        (128, 1, 2, 8),
        (128, 1, 3, 8),
        (32, 1, 4, 16),
        (64, 2, 3, 8),
        (256, 4, 2, 3),
        (256, 4, 3, 3),
        (256, 2, 2, 4),
        (128, 4, 3, 4),
        (128, 4, 2, 4),
    )
]


def parity(name: str, variant: Variant, *, precise: bool) -> Iterator[Row]:
    """The kernel against the reference, twice."""
    case = make_case(variant)
    query, pages, *_ = case.arrays
    config = triton.config_for(query.shape, pages, case.options["value_format"], precise=precise)
    config = dataclasses.replace(config, programs=64)
    run = jax.jit(functools.partial(decode_attention, **case.options, config=config, implementation="triton"))
    got = jax.block_until_ready(run(*case.arrays))
    same = bool(jnp.array_equal(got.acc, run(*case.arrays).acc))
    want = decode_attention(*case.arrays, **case.options, implementation="reference")
    error = relative_error(got, want)
    ok = same and error <= (1e-3 if precise else variant.tolerance)
    yield {"variant": name, "precise": precise, "error": error, "same_twice": same, "ok": ok}


def jobs(parts: list[str], setting: Setting) -> Iterator[tuple[str, Job]]:
    """Everything to measure, with the kind of its rows."""
    for name, variant in VARIANTS.items() if "parity" in parts else ():
        for precise in (False, True) if variant.count * variant.group <= 8 else (False,):
            yield "parity", Job(name, functools.partial(parity, name, variant, precise=precise))
    for bits in (4, 3, 2) if "configs" in parts else ():
        for config in CONFIGS:
            case = Case(DECODE["batch 8"], MSE[bits], MSE[bits], config=config)
            yield "rows", Job(f"{case.label} {config}", functools.partial(run_case, case, setting))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=float, default=500, help="seconds")
    parser.add_argument("--json", help="where to write the results")
    parser.add_argument("--parts", default="parity,configs")
    options = parser.parse_args()
    end = time.monotonic() + options.limit
    setting = Setting(gpu=True, copy_gbps=timing.copy_gbps(COPY_BYTES[True]))
    data = environment() | {"copy_gbps": setting.copy_gbps, "parity": [], "rows": []}
    for kind, job in jobs(options.parts.split(","), setting):
        if time.monotonic() > end:
            break
        try:
            found = list(job.run())
        except Exception as error:
            traceback.print_exc()
            found = [{"failed": job.label, "error": repr(error)[:400], "ok": False}]
        data[kind] += found
        for row in found:
            print(kind, json.dumps(row), flush=True)
        write_json(data, options.json)
    failed = [row for row in data["parity"] + data["rows"] if not row["ok"]]
    print("failures:", failed)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
