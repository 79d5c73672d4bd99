"""Other implementations of attention over full-precision and fp8 keys and values, timed in the same process."""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import jax

from tq_jax.commands.bench.shapes import Shape
from tq_jax.commands.bench.timing import Timing, num_copies, time_jax, time_torch

FLASHINFER_PAGE = 64
"""Tokens per page of FlashInfer's cache."""


@dataclasses.dataclass(frozen=True)
class Peer:
    """An implementation to compare with.

    Attributes:
        name: Name in rows.
        packages: Packages that it needs besides JAX.
        element_bytes: Bytes per stored channel.
        time: Times attention of a shape, without causal masks.
        dims: Head dims at which it is measured; each may cost a compilation.
        max_q_len: Most query tokens per sequence.
    """

    name: str
    packages: tuple[str, ...]
    element_bytes: int
    time: Callable[[Shape], Timing]
    dims: tuple[int, ...] = (64, 128, 256)
    max_q_len: int = 4096

    def supports(self, shape: Shape) -> bool:
        """Whether the peer is measured at a shape."""
        return shape.head_dim in self.dims and shape.q_len <= self.max_q_len

    def nbytes(self, shape: Shape) -> int:
        """Bytes of the keys and values that the peer reads."""
        return shape.nbytes(2 * shape.head_dim * self.element_bytes)

    @property
    def missing(self) -> str | None:
        """Why the peer cannot run on this machine; None if it can."""
        if jax.default_backend() != "gpu":
            return "no NVIDIA GPU"
        absent = [name for name in self.packages if importlib.util.find_spec(name) is None]
        return f"not installed: {', '.join(absent)}" if absent else None


def _torch_tensors(shape: Shape, *, copies: int, order: tuple[int, ...], dtype: Any) -> tuple[Any, list[Any]]:
    """Queries, and keys with values [2, ...] of each copy; `order` permutes batch, heads, tokens and channels."""
    import torch

    def random(heads: int, tokens: int, *lead: int) -> Any:
        axes = (shape.batch, heads, tokens, shape.head_dim)
        return torch.randn(*lead, *(axes[i] for i in order), device="cuda", dtype=torch.bfloat16)

    query = random(shape.q_heads, shape.q_len)
    return query, [random(shape.kv_heads, shape.seq, 2).to(dtype) for _ in range(copies)]


def _time_sdpa(shape: Shape, *, backend: str) -> Timing:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    copies = num_copies(shape.nbytes(4 * shape.head_dim))
    query, caches = _torch_tensors(shape, copies=copies, order=(0, 1, 2, 3), dtype=torch.bfloat16)
    attend = functools.partial(torch.nn.functional.scaled_dot_product_attention, enable_gqa=True)
    with sdpa_kernel(getattr(SDPBackend, backend)):
        timing = time_torch([functools.partial(attend, query, *cache) for cache in caches])
    del query, caches
    torch.cuda.empty_cache()
    return timing


def _time_jax_cudnn(shape: Shape) -> Timing:
    copies = num_copies(shape.nbytes(4 * shape.head_dim))
    keys = jax.random.split(jax.random.key(0), 2 * copies + 1)

    def random(key: Any, tokens: int, heads: int) -> Any:
        return jax.random.normal(key, (shape.batch, tokens, heads, shape.head_dim), jax.numpy.bfloat16)

    query = random(keys[0], shape.q_len, shape.q_heads)
    caches = [[random(k, shape.seq, shape.kv_heads) for k in keys[1 + 2 * i : 3 + 2 * i]] for i in range(copies)]
    attend = jax.jit(functools.partial(jax.nn.dot_product_attention, implementation="cudnn"))
    return time_jax(attend, [(query, *cache) for cache in caches])


def _time_flashinfer(shape: Shape, *, dtype: str) -> Timing:
    import flashinfer
    import torch

    stored = getattr(torch, dtype)
    copies = num_copies(shape.nbytes(2 * shape.head_dim * stored.itemsize))
    query, caches = _torch_tensors(shape, copies=copies, order=(0, 2, 1, 3), dtype=stored)
    pages = shape.seq // FLASHINFER_PAGE
    workspace = torch.zeros(128 << 20, dtype=torch.uint8, device="cuda")
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
    integers = functools.partial(torch.arange, dtype=torch.int32, device="cuda")
    wrapper.plan(
        integers(shape.batch + 1) * pages,
        integers(shape.batch * pages),
        torch.full((shape.batch,), FLASHINFER_PAGE, dtype=torch.int32, device="cuda"),
        shape.q_heads,
        shape.kv_heads,
        shape.head_dim,
        FLASHINFER_PAGE,
        q_data_type=torch.bfloat16,
        kv_data_type=stored,
    )
    paged = [tuple(half.reshape(-1, FLASHINFER_PAGE, *half.shape[2:]) for half in cache) for cache in caches]
    timing = time_torch([functools.partial(wrapper.run, query[:, 0], cache) for cache in paged])
    del wrapper, workspace, paged, caches, query
    torch.cuda.empty_cache()
    return timing


_FLASHINFER = {"packages": ("torch", "flashinfer"), "dims": (128,), "max_q_len": 1}
PEERS = (
    Peer("cudnn_bf16", ("torch",), 2, functools.partial(_time_sdpa, backend="CUDNN_ATTENTION")),
    Peer("flash_bf16", ("torch",), 2, functools.partial(_time_sdpa, backend="FLASH_ATTENTION")),
    Peer("jax_cudnn_bf16", (), 2, _time_jax_cudnn),
    Peer(
        "flashinfer_bf16",
        element_bytes=2,
        time=functools.partial(_time_flashinfer, dtype="bfloat16"),
        **_FLASHINFER,
    ),
    Peer(
        "flashinfer_fp8",
        element_bytes=1,
        time=functools.partial(_time_flashinfer, dtype="float8_e4m3fn"),
        **_FLASHINFER,
    ),
)
"""cuDNN (through torch and through JAX), flash attention and FlashInfer."""
