"""Scratch: q_len 4, other head dims, prod keys; cuDNN beside."""

import os, sys, json, functools

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
sys.path.insert(0, os.getcwd())
import warnings

warnings.filterwarnings("ignore")
import jax, jax.numpy as jnp, numpy as np
import tq_jax as tq
from benchmarks import decode as D
from pallas_kernels.decode import LogitOptions, TileConfig, triton

out = os.environ.get("OUT", "/tmp")
rows = []
r = D.Results(None, float(sys.argv[1]))


def pages_of(kf, vf, tokens, page):
    shapes = jax.eval_shape(lambda: D.empty_pages(tokens // page, 8, page, kf, vf))
    leaves, tree = jax.tree.flatten(shapes)
    ks = jax.random.split(jax.random.key(0), len(leaves))
    f = lambda k, l: (
        jax.random.bits(k, l.shape, jnp.uint8)
        if l.dtype == jnp.uint8
        else jax.random.uniform(k, l.shape, jnp.float32, 8.0, 14.0).astype(l.dtype)
    )
    return tree.unflatten([f(k, l) for k, l in zip(ks, leaves)])


def case(label, kk, vk, dim, count, cfgs, batch=8, seq=32768, group=4, page=256):
    kf, vf = tq.QuantizerSpec(dim, **kk).format, tq.QuantizerSpec(dim, **vk).format
    nbytes = batch * seq * 8 * (kf.bytes_per_vector + vf.bytes_per_vector)
    copies = max(1, min(4, int(np.ceil(250e6 / nbytes))))
    pages = pages_of(kf, vf, copies * batch * seq, page)
    order = np.random.default_rng(0).permutation(copies * batch * seq // page).astype(np.int32)
    tables = jnp.asarray(order.reshape(copies, batch, seq // page))
    q = jax.random.normal(jax.random.key(1), (batch, count, 8 * group, dim))
    lengths = jnp.full(batch, seq, jnp.int32)
    pos = lengths[:, None] - count + jnp.arange(count)
    sk = q if kk.get("kind") == "prod" else None
    for c in cfgs:
        if r.over:
            return
        cfg = (
            None
            if c is None
            else TileConfig(tile=c[0], num_warps=c[1], num_stages=c[2], programs=132 * c[3], precise=len(c) > 4)
        )
        try:

            @jax.jit
            def run(q, pages, tables):
                return [
                    triton.attend_pages(
                        q + 0.01 * i,
                        pages,
                        tables[i],
                        lengths,
                        positions=pos,
                        key_format=kf,
                        value_format=vf,
                        options=LogitOptions(dim**-0.5),
                        logit_bias=None,
                        sketch_query=sk,
                        config=cfg,
                    ).acc
                    for i in range(copies)
                ]

            dec, other, names = D.kernel_times(run, q, pages, tables)
            row = dict(
                label=label,
                us=round(dec / copies, 1),
                other=round(other / copies, 1),
                floor=round(nbytes / 2.9e6, 1),
                cfg=c,
            )
        except Exception as e:
            row = dict(label=label, cfg=c, failed=repr(e)[:200])
        rows.append(row)
        print(json.dumps(row), flush=True)
        json.dump(rows, open(f"{out}/cases.json", "w"))


def cudnn(dim, count):
    D.DIM = dim
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q = torch.randn(8, 32, count, dim, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(8, 8, 32768, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for name, b in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
        try:
            with sdpa_kernel(b):
                call = lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
                for _ in range(3):
                    call()
                torch.cuda.synchronize()
                ts = []
                for _ in range(10):
                    a, z = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    a.record()
                    call()
                    z.record()
                    torch.cuda.synchronize()
                    ts.append(a.elapsed_time(z) * 1e3)
            row = dict(label=f"{name} d{dim} q{count}", us=round(sorted(ts)[5], 1))
        except Exception as e:
            row = dict(label=f"{name} d{dim} q{count}", failed=repr(e)[:150])
        rows.append(row)
        print(json.dumps(row), flush=True)
    del q, k, v
    torch.cuda.empty_cache()
    D.DIM = 128


B = lambda b: {"bits": b}
for part in sys.argv[2].split(","):
    if part == "final":
        for kb, vb in ((3, 3), (4, 4), (2, 2)):
            for b, n in ((8, 32768), (32, 8192), (1, 131072), (1, 32768)): case(f"k{kb}v{vb} {b}x{n}", B(kb), B(vb), 128, 1, [None], batch=b, seq=n)
        case("k4v4 q4", B(4), B(4), 128, 4, [None]); case("k4v4 q8", B(4), B(4), 128, 8, [None])
        cudnn(256, 1); cudnn(64, 1)
        case("k4v4 d256", B(4), B(4), 256, 1, [None, (128, 2, 3, 4), (64, 1, 3, 8), (256, 4, 3, 2), (128, 2, 3, 3)])
        case("k3v3 d256", B(3), B(3), 256, 1, [None, (128, 2, 3, 4)])
        case("k4v4 d64", B(4), B(4), 64, 1, [None, (256, 4, 3, 2)])
        case("prod3 group2", {"bits": 3, "kind": "prod"}, {"bits": 2, "kind": "group"}, 128, 1, [None])
        case("k2.5v2.5", B(2.5), B(2.5), 128, 1, [None, (128, 2, 3, 4)])
        case("k4v4 pages16", B(4), B(4), 128, 1, [None], page=16)
