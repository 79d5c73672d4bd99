"""Time of tile configurations on a GPU, on the timer of `tq-jax bench`.

    python benchmarks/tiles.py decode --bits 4,3 --tiles "64,1,3,12 128,2,3,6" --json tiles.json

A configuration of decode is its tile, warps, stages and programs per multiprocessor; of prefill its rows, tile, warps,
stages and programs per multiprocessor. Some do not fit on every GPU: their rows say why, and nothing else fails.
"""

import functools
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import jobs
from pallas_kernels.attention import PrefillConfig, TileConfig
from pallas_kernels.compat.device import multiprocessors
from tq_jax.commands.bench import timing
from tq_jax.commands.bench.command import COPY_BYTES, MATRIX
from tq_jax.commands.bench.decode import DECODE_ATTENTION
from tq_jax.commands.bench.job import Setting
from tq_jax.commands.bench.paged import MSE, Case, run_case
from tq_jax.commands.bench.prefill import PREFILL_ATTENTION
from tq_jax.commands.bench.shapes import DECODE, PREFILL, Shape

TILES = {
    "decode": "64,1,3,12 64,1,2,12 64,1,3,10 64,1,4,12 64,1,3,24 128,2,3,6 128,2,2,6 128,1,2,8 128,1,3,8 32,1,4,16 "
    "64,2,3,8 256,4,2,3 256,4,3,3 256,2,2,4 128,4,3,4 128,4,2,4",
    "prefill": "128,64,8,2,2 128,64,8,3,2 128,64,4,2,2 64,64,4,2,4 64,64,4,3,4 256,64,8,2,1 128,128,8,2,2",
}
OPERATIONS = {"decode": (DECODE_ATTENTION, DECODE, TileConfig), "prefill": (PREFILL_ATTENTION, PREFILL, PrefillConfig)}


def time_tiles(op: str, shape: Shape, bits: int, text: str, setting: Setting) -> dict[str, Any]:
    """Time of one configuration."""
    operation, _, config = OPERATIONS[op]
    *sizes, programs = map(int, text.split(","))
    case = Case(shape, MSE[bits], MSE[bits], config=config(*sizes, programs * multiprocessors()))
    [row] = run_case(operation, case, setting)
    return row


def main() -> None:
    parser = jobs.make_parser(__doc__)
    parser.add_argument("op", choices=OPERATIONS)
    parser.add_argument("--shape", help="name in tq_jax.commands.bench.shapes; the first by default")
    parser.add_argument("--bits", default="4,3,2", help="of keys and values")
    parser.add_argument("--tiles", help="configurations, separated by spaces")
    parser.set_defaults(limit=500)
    options = parser.parse_args()
    jobs.prepare()
    shapes = OPERATIONS[options.op][1]
    shape = shapes[options.shape or next(iter(shapes))]
    setting = Setting(True, timing.copy_gbps(COPY_BYTES[True]), timing.matmul_tflops(MATRIX[True]))
    timings = {
        f"{bits} bits, {text}": functools.partial(time_tiles, options.op, shape, bits, text, setting)
        for bits in map(int, options.bits.split(","))
        for text in (options.tiles or TILES[options.op]).split()
    }
    jobs.run(timings, options, copy_gbps=setting.copy_gbps)


if __name__ == "__main__":
    main()
