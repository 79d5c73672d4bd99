"""Scratch: parity of all variants, timings by width and tiles."""

import os, sys, time, json

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
sys.path.insert(0, os.getcwd())
import warnings

warnings.filterwarnings("ignore")
from benchmarks import decode as D
from pallas_kernels.decode import TileConfig

mode = sys.argv[1]
out = os.environ.get("OUT", "/tmp")


def cfgs(text):
    return [TileConfig(tile=t, num_warps=w, num_stages=s, programs=132 * p) for t, w, s, p in eval(text)]


if mode == "ncu":
    import jax

    r = D.Results(None, 60)

    def once(function, *a, iterations=5):
        jax.block_until_ready(function(*a))
        return 1.0, 1.0, {}

    D.kernel_times = once
    D.end_to_end = lambda f, *a, **k: 1.0
    for widths in eval(sys.argv[2]):
        for c in cfgs(sys.argv[3]):
            D.time_decode(r, widths, 8, 32768, c, 2923.5)
    sys.exit()
r = D.Results(f"{out}/core.json", float(sys.argv[2]))
if "parity" in mode:
    D.check_parity(r)
bw = D.copy_bandwidth()
print("copy", bw, flush=True)
if "time" in mode:
    for shape in eval(sys.argv[3]):
        D.guarded(r, "peers", D.time_cudnn, r, *shape)
        for widths in eval(sys.argv[4]):
            for c in cfgs(sys.argv[5]):
                D.guarded(r, f"{shape} {widths} {c}", D.time_decode, r, widths, *shape, c, bw)
    for x in r.data["rows"]:
        c = x.get("config")
        print(
            x.get("impl"),
            x.get("batch"),
            x.get("seq"),
            x.get("key"),
            x.get("value"),
            x.get("us"),
            x.get("merge_us"),
            x.get("floor_us"),
            c and (c["tile"], c["num_warps"], c["num_stages"], c["programs"] // 132),
            x.get("failed"),
            x.get("error", "")[:100],
            flush=True,
        )
bad = [x for x in r.data["parity"] if not x["ok"]]
print("parity bad:", bad)
