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
    if part == "main":
        for kb, vb in ((4, 4), (2, 2), (3, 3), (8, 4)):
            case(f"k{kb}v{vb}", B(kb), B(vb), 128, 1, [None, (256, 4, 3, 2), (128, 2, 3, 4)])
    if part == "q4":
        case(
            "k4v4 q4", B(4), B(4), 128, 4, [(64, 2, 3, 4), (128, 2, 3, 4), (64, 2, 3, 5), (64, 1, 3, 8), (128, 2, 2, 4)]
        )
    if part == "dims":
        for d in (64, 256):
            cudnn(d, 1)
            cf = (
                [(128, 2, 3, 4), (256, 4, 3, 2), (64, 2, 3, 6), (128, 2, 3, 6)]
                if d == 64
                else [(64, 2, 3, 4), (128, 4, 3, 2), (64, 4, 3, 3), (128, 2, 3, 3)]
            )
            for kb, vb in ((4, 4), (3, 3)):
                case(f"k{kb}v{vb} d{d}", B(kb), B(vb), d, 1, cf)
    if part == "prod":
        case(
            "prod3 group2",
            {"bits": 3, "kind": "prod"},
            {"bits": 2, "kind": "group"},
            128,
            1,
            [(64, 2, 3, 4), (128, 2, 3, 4), (128, 4, 3, 2), (64, 4, 3, 3), (64, 1, 3, 8)],
        )
    if part == "small":
        case("k4v4 pages16", B(4), B(4), 128, 1, [(64, 2, 3, 4), (128, 2, 3, 4), (32, 1, 3, 8)], page=16)
        case("k4v4 precise", B(4), B(4), 128, 1, [(64, 2, 3, 4, 1), (128, 2, 3, 4, 1), (64, 4, 3, 2, 1)])
        case("k4v4 q8", B(4), B(4), 128, 8, [(64, 2, 3, 4), (128, 2, 3, 3)])
        case("k4v4 q8 g16", B(4), B(4), 128, 8, [(64, 2, 3, 4)], group=16, batch=4)
