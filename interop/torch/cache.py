"""A compressed cache whose memory torch owns: the bytes of `tq_jax.Cache`, written in place by torch.

Tokens go where `tq_jax.append` puts them and give the same codes. On a GPU torch launches the kernels that append and
attend. On a CPU JAX computes codes and attention over views of the tensors, and torch moves and writes the tokens.
"""

import os
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import jax
import torch
from jaxtyping import Float

import tq_jax as tq
from interop.launcher.cuda_graph import GraphPool
from interop.torch import custom_ops, jax_calls
from interop.torch.append_on_cpu import update_statistics, write_chunk
from interop.torch.attend_on_gpu import AttendOptions
from interop.torch.dlpack import to_torch
from interop.torch.kernels import CacheKernels
from interop.torch.placement import counters_after, plan_append, require_chunk, require_room, row_integers
from interop.torch.read import read_tokens
from interop.torch.rows import CacheRows
from interop.torch.tensors import empty_tensors, map_rows
from tq_jax.attention_checks import check_query

Lengths = Sequence[int] | torch.Tensor
"""Tokens of each row's chunk; a tensor may be on the GPU, where every replay of a CUDA graph reads it anew."""


class TorchCache(CacheRows):
    """A cache of torch tensors.

    A CUDA graph can capture `append` and `attend` once each has run with the same shapes; see `advance`.

    Attributes:
        kernels: Kernels for a GPU and their CUDA graphs; a new object once memory has moved.

    Args:
        spec: Configuration of the cache.
        batch: Number of cache rows.
        seed: Seed of the quantizers; the same seed gives the bytes that `tq_jax.init_cache` gives.
        device: Where to allocate.
        graph_pool: Memory of CUDA graphs (see `extend`) that caches which never run at the same time can share.
        options: `statistics`, `key_quantizer`, `value_quantizer` of `tq_jax.init_cache`, as JAX arrays.

    Example:
        >>> quantizer = tq.QuantizerSpec(dim=64, bits=4)
        >>> spec = tq.CacheSpec(num_kv_heads=2, head_dim=64, max_tokens=512, key=quantizer, value=quantizer)
        >>> cache = TorchCache(spec, batch=1)
        >>> cache.append(torch.ones(1, 200, 2, 64), torch.ones(1, 200, 2, 64))
        >>> cache.lengths, cache.compressed, cache.attend(torch.ones(1, 1, 8, 64)).shape
        ((200,), (68,), torch.Size([1, 1, 8, 64]))
        >>> cache
        TorchCache(K4/V4, rows=1, lengths=(200,), 0.12 MB on cpu)
    """

    def __init__(
        self,
        spec: tq.CacheSpec,
        batch: int,
        *,
        seed: int = 0,
        device: str | torch.device = "cpu",
        graph_pool: GraphPool | None = None,
        **options: Any,
    ) -> None:
        self.device = torch.device(device)
        self._adopt(empty_tensors(spec, batch, self.device, seed=seed, **options), graph_pool)

    @classmethod
    def from_jax(cls, cache: tq.Cache, *, device: str | torch.device = "cpu") -> "TorchCache":
        """A copy of a JAX cache that torch owns."""
        return cls._of(jax.tree.map(lambda x: x.to(device, copy=True), to_torch(cache)), torch.device(device))

    @classmethod
    def load(
        cls, path: str | os.PathLike, *, max_tokens: int | None = None, device: str | torch.device = "cpu"
    ) -> "TorchCache":
        """Reads what `save` or `tq_jax.save_cache` wrote; arguments and errors are those of `tq_jax.load_cache`."""
        return cls.from_jax(tq.load_cache(path, max_tokens=max_tokens), device=device)

    def fork(self, *, graph_pool: GraphPool | None = None) -> "TorchCache":
        """An independent copy; the quantizers, which never change, are shared.

        Args:
            graph_pool: As for the class.
        """
        return self._of(map_rows(self.arrays, lambda tensor, _: tensor.clone()), self.device, graph_pool)

    @classmethod
    def _of(cls, arrays: tq.Cache, device: torch.device, pool: GraphPool | None = None) -> "TorchCache":
        """A cache of given tensors."""
        new = cls.__new__(cls)
        new.device = device
        new._adopt(arrays, pool)
        return new

    def _adopt(self, arrays: tq.Cache, pool: GraphPool | None = None) -> None:
        super()._adopt(arrays)
        if not hasattr(self, "_number"):
            self._number = custom_ops.register(self)
            self._version = torch.zeros(1, dtype=torch.int32, device="cpu")
            self._pool = pool or GraphPool()
        self.kernels = CacheKernels(arrays, self._pool)

    __copy__ = fork

    def __deepcopy__(self, memo: Any) -> "TorchCache":
        return self.fork(graph_pool=deepcopy(self._pool, memo))

    def __getstate__(self) -> dict[str, Any]:
        return {"arrays": self.arrays, "pool": self._pool}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.device = state["arrays"].length.device
        self._adopt(state["arrays"], state["pool"])

    def append(
        self,
        k: Float[torch.Tensor, "b t h_kv d"],
        v: Float[torch.Tensor, "b t h_kv d"],
        *,
        query: Float[torch.Tensor, "b t h_q d"] | None = None,
        lengths: Lengths | None = None,
    ) -> None:
        """Appends one token or a chunk to every row, in place.

        Args:
            k: Keys, after rotary embedding.
            v: Values, shaped like the keys.
            query: Queries of the same tokens; only their channel-wise power is kept, for `smooth_keys`.
            lengths: Number of real tokens in each row's chunk; the rest is right padding. All by default. While a CUDA
                graph captures the append, a tensor on the GPU; otherwise a tensor is read back.

        Raises:
            ValueError: For shapes that do not fit or a row without room, before anything is written. Tokens are not
                searched for numbers that are not finite: these give NaN, never a finite wrong result.
        """
        if torch.compiler.is_compiling():
            custom_ops.append(k, v, query, self._version, self._number, lengths)
        else:
            self.append_now(k, v, query=query, lengths=lengths)

    def append_now(
        self, k: torch.Tensor, v: torch.Tensor, *, query: torch.Tensor | None, lengths: Lengths | None
    ) -> None:
        """`append`, outside of a compiled graph."""
        require_chunk(self.spec, self.device, self.rows, k, v, query)
        if self.is_capturing:
            if not self._ready and self.arrays.pages is not None:
                raise ValueError(
                    f"expected fixed key statistics when a CUDA graph captures an append, got rows of {self.lengths} "
                    f"tokens: they are fixed when the first token leaves the window of {self.spec.window}"
                )
            self.kernels.append(k, v, self._on_device(lengths))
            return
        counts = self._counts(k, lengths)
        require_room(self.spec, self.lengths, counts)
        if not any(counts):
            return
        after = counters_after(self.spec, self.lengths, self.compressed, counts)
        if not self._ready:
            evicts = tuple(new > old for old, new in zip(self.compressed, after[1], strict=True))
            self._ready = update_statistics(
                self.arrays, self._stored(k), query, lengths=self.lengths, counts=counts, evicts=evicts
            )
        if self.on_gpu:
            self.kernels.append(k, v, self._on_device(lengths))
        else:
            moves = plan_append(self.spec, self.lengths, self.compressed, counts, str(self.device))
            write_chunk(self.arrays, self.as_jax(), self._stored(k), self._stored(v), moves)
        self.lengths, self.compressed = after

    def _stored(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens in the type of the window."""
        return tokens.detach().to(self.arrays.exact_keys.dtype)

    def attend(
        self,
        query: Float[torch.Tensor, "b t h_q d"],
        *,
        sliding_window: int | None = None,
        softcap: float | None = None,
        sink_logits: Float[torch.Tensor, "h_q"] | None = None,
        scale: float | None = None,
        lengths: Lengths | None = None,
        precise: bool = False,
    ) -> Float[torch.Tensor, "b t h_q d"]:
        """Causal attention of the latest tokens over everything in the cache; arguments as in `tq_jax.attend`.

        On the CPU JAX computes it; on a GPU torch launches the kernels, and `precise` chooses their arithmetic. There
        is no gradient: a backward pass that reaches the output raises NotImplementedError.
        """
        if torch.compiler.is_compiling():
            return custom_ops.attend(
                query, self._version, self._number, sliding_window, softcap, sink_logits, scale, lengths, precise
            )
        options = AttendOptions(sliding_window, softcap, scale, precise)
        out = self.attend_now(query, options, sink_logits=sink_logits, lengths=lengths)
        return custom_ops.refuse_gradient(out, query, sink_logits)

    def attend_now(
        self,
        query: torch.Tensor,
        options: AttendOptions,
        *,
        sink_logits: torch.Tensor | None,
        lengths: Lengths | None,
    ) -> torch.Tensor:
        """`attend`, outside of a compiled graph."""
        if self.device.type != query.device.type:
            raise ValueError(f"expected a query on {self.device}, got one on {query.device}")
        if not self.is_capturing:
            self._counts(query, lengths)
        counts = self._on_device(lengths)
        if self.on_gpu:
            return self.kernels.attend(query, options, sink_logits, counts)
        tensors = {"sink_logits": sink_logits, "lengths": counts}
        given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        return jax_calls.attend(query, self.as_jax(), **options.of_logits, **given)

    def extend(
        self,
        k: Float[torch.Tensor, "b t h_kv d"],
        v: Float[torch.Tensor, "b t h_kv d"],
        query: Float[torch.Tensor, "b t h_q d"],
        *,
        lengths: Lengths | None = None,
        sink_logits: Float[torch.Tensor, "h_q"] | None = None,
        **options: Any,
    ) -> Float[torch.Tensor, "b t h_q d"]:
        """`append`, then `attend`, whose arguments it takes.

        On a GPU one token of every row is replayed as a CUDA graph from the second such call on, with a third of the
        host's time. Inputs and outputs of the graph are copied, so the result is that of the two calls.
        """
        given = (k, v, query) if sink_logits is None else (k, v, query, sink_logits)
        single = lengths is None and k.shape[1:2] == (1,) and self.takes_tokens
        replayable = single and not torch.compiler.is_compiling() and not self.is_capturing
        out = self.kernels.replay(given, options) if replayable else None
        if out is None:
            check_query(self.spec, self.rows, query, sink_logits, **AttendOptions(**options).of_logits)
            self.append(k, v, query=query, lengths=lengths)
            out = self.attend(query, lengths=lengths, sink_logits=sink_logits, **options)
            if replayable:
                self.kernels.prepare_replay(given, options)
            return out
        self._advance((1,) * self.rows)
        return custom_ops.refuse_gradient(out, query, sink_logits)

    def read(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """All tokens, decompressed, for attention that is not the cache's own; `attend` needs no such copy.

        Args:
            dtype: Type of the result.

        Returns:
            Keys and values [rows, h_kv, t, d] in the order of their positions, where t is the longest row; zeros behind
            the tokens of shorter rows. What lies in the window and the sinks is as it was stored.
        """
        return read_tokens(self.arrays, self.lengths, self.compressed, dtype)

    @property
    def takes_tokens(self) -> bool:
        """Whether launches alone append a token to every row: on a GPU, with fixed statistics and room."""
        return self.on_gpu and self._ready and max(self.lengths, default=0) < self.spec.max_tokens

    @property
    def on_gpu(self) -> bool:
        """Whether torch launches the kernels; elsewhere JAX computes."""
        return self.device.type == "cuda"

    @property
    def is_capturing(self) -> bool:
        """Whether a CUDA graph is being captured, so that launches are recorded and do not run."""
        return self.on_gpu and torch.cuda.is_current_stream_capturing()

    def _on_device(self, lengths: Lengths | None) -> torch.Tensor | None:
        if lengths is None or isinstance(lengths, torch.Tensor):
            return None if lengths is None else lengths.to(self.device, torch.int32)
        return torch.tensor(lengths, dtype=torch.int32, device=self.device)

    def _counts(self, chunk: torch.Tensor, lengths: Lengths | None) -> tuple[int, ...]:
        """Number of real tokens in each row's chunk.

        Raises:
            ValueError: For numbers outside the chunk, or another number of them than rows.
        """
        most = chunk.shape[1] if chunk.ndim == 4 else 0
        counts = (most,) * self.rows if lengths is None else row_integers(lengths)
        if len(counts) != self.rows or any(not 0 <= count <= most for count in counts):
            raise ValueError(f"expected {self.rows} lengths from 0 to {most}, got {list(counts)}")
        return counts
