"""Scratch: parity shards and debug cases."""

import os, sys, time, json, dataclasses, functools, traceback

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
sys.path.insert(0, os.getcwd())
import warnings

warnings.filterwarnings("ignore")
import jax, jax.numpy as jnp
from benchmarks import decode as D
from benchmarks.variants import VARIANTS, Variant, _bits, make_case, relative_error, tolerance
from pallas_kernels.decode import decode_attention, triton

mode, i, n, limit = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
end = time.monotonic() + limit


def one(name, variant, precise, **change):
    row = {"variant": name, "precise": precise, **change}
    try:
        case = make_case(variant)
        q, pages, *_ = case.arrays
        cfg = triton.config_for(
            q.shape, pages, case.options["key_format"], case.options["value_format"], precise=precise
        )
        cfg = dataclasses.replace(cfg, **({"programs": 64} | change))
        run = jax.jit(functools.partial(decode_attention, **case.options, config=cfg, implementation="triton"))
        got = jax.block_until_ready(run(*case.arrays))
        again = run(*case.arrays)
        want = decode_attention(*case.arrays, **case.options, implementation="reference")
        row["error"] = relative_error(got, want)
        row["same"] = bool(jnp.array_equal(got.acc, again.acc))
        row["cfg"] = (cfg.tile, cfg.num_warps)
        row["ok"] = row["same"] and row["error"] <= (1e-4 if precise else tolerance(variant))
    except Exception as e:
        row |= {"ok": False, "failed": repr(e)[:300]}
    print("ok " if row["ok"] else "BAD", json.dumps(row), flush=True)


if mode == "parity":
    items = [(k, v, p) for k, v in VARIANTS.items() for p in (False, True)]
    for k, v, p in items[i::n]:
        if time.monotonic() > end:
            print("OUT OF TIME")
            break
        one(k, v, p)
else:
    items = []
    for kb, vb in ((2, 2), (4, 2), (2, 4), (2, 3), (4, 3), (3, 3)):
        for w in (1, 2):
            items.append((f"d64 k{kb}v{vb}", _bits(kb, vb, dim=64), True, {"num_warps": w}))
    for w in (1, 2, 4):
        items.append(("group16", _bits(4, 4, group=16), True, {"num_warps": w}))
    for w in (2, 4):
        items.append(("group16 d", _bits(4, 4, group=16), False, {"num_warps": w, "tile": 64}))
    for w in (2, 4):
        items.append(("c8g4", _bits(4, 4, group=4, count=8), True, {"num_warps": w, "tile": 32}))
    for name, v, p, ch in items[i::n]:
        if time.monotonic() > end:
            print("OUT OF TIME")
            break
        one(name, v, p, **ch)
