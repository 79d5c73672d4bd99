"""A compressed cache whose memory torch owns: the bytes of `tq_jax.Cache`, written in place by torch.

Tokens go where `tq_jax.append` puts them and give the same codes. On a GPU torch launches the kernels that append and
attend; on a CPU JAX computes the codes and the attention, over views, and torch moves tokens and writes. A cache has
rows, each a sequence.
"""

import dataclasses
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
from interop.torch.dlpack import to_jax, to_torch
from interop.torch.kernels import CacheKernels
from interop.torch.placement import counters_after, plan_append, require_chunk, require_room, row_integers
from interop.torch.tensors import empty_tensors, grow_pools, load_tensors, map_rows, move_rows, named_tensors
from tq_jax.attention import check_query

Lengths = Sequence[int] | torch.Tensor
"""Tokens of each row; a tensor may be on the GPU, where a CUDA graph reads it anew."""


class TorchCache:
    """A cache of torch tensors.

    Cropping keeps what is compressed compressed: a token that has left the window is not made exact again, so after a
    crop the window holds fewer exact tokens than it could until new ones fill it. Key statistics, once fixed, stay.

    A CUDA graph can capture `append` and `attend` once each has run with the same shapes; see `advance`.

    Attributes:
        arrays: The cache as a pytree of tensors (bfloat16 where JAX holds its bits). Write it only through methods.
        device: Where it lives.
        kernels: What a GPU runs; another object once memory has moved.

    Args:
        spec: What the cache holds.
        batch: Rows.
        seed: Seed of the quantizers; the same one gives the bytes that `tq_jax.init_cache` gives.
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
        new = cls.__new__(cls)
        new.device = torch.device(device)
        new._adopt(jax.tree.map(lambda x: x.to(device, copy=True), to_torch(cache)))
        return new

    def _adopt(self, arrays: tq.Cache, pool: GraphPool | None = None) -> None:
        """Takes over tensors and reads the counters that the host keeps."""
        self.arrays: Any = arrays  # a Cache, of leaves that its annotations do not know
        self.lengths = tuple(arrays.length.tolist())
        self.compressed = tuple(arrays.compressed.tolist())
        self._ready = arrays.statistics is None or bool(arrays.statistics.ready.all())
        if not hasattr(self, "_number"):
            self._number, self._version = custom_ops.register(self), torch.zeros(1, dtype=torch.int32)
            self._pool = pool or GraphPool()
        self._view: Any = None
        self.kernels = CacheKernels(arrays, self._pool)

    @property
    def spec(self) -> tq.CacheSpec:
        """What the cache holds."""
        return self.arrays.spec

    @property
    def rows(self) -> int:
        """Independent sequences."""
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor that the cache owns."""
        return sum(tensor.nbytes for tensor in jax.tree.leaves(self.arrays))

    def as_jax(self) -> Any:
        """The cache as JAX arrays over the same memory, to read; `interop.torch.dlpack` says how long it is current."""
        if self.device.type != "cpu":
            return to_jax(self.arrays)
        if self._view is None:
            self._view = to_jax(self.arrays)
        return self._view

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
            v: Values.
            query: Queries of the same tokens; only their channel-wise power is kept, for `smooth_keys`.
            lengths: Tokens of each row's chunk that exist; the rest is right padding. All by default. While a CUDA
                graph captures the append, a tensor on the GPU; otherwise one is read back.

        Raises:
            ValueError: For shapes that do not fit or a row without room, before anything is written. Tokens that are
                not finite are not looked for: they give NaN, never a finite wrong result.
        """
        if torch.compiler.is_compiling():
            custom_ops.append(k, v, query, self._version, self._number, lengths)
        else:
            self.append_now(k, v, query=query, lengths=lengths)

    def append_now(
        self, k: torch.Tensor, v: torch.Tensor, *, query: torch.Tensor | None, lengths: Lengths | None
    ) -> None:
        """`append`, outside of a compiled graph."""
        if self.is_capturing:
            require_chunk(self.spec, self.device, self.lengths, (0,) * self.rows, k, v, query)
            if not self._ready and self.arrays.pages is not None:
                raise ValueError(
                    f"expected fixed key statistics when a CUDA graph captures an append, got rows of {self.lengths} "
                    f"tokens: they are fixed when the first token leaves the window of {self.spec.window}"
                )
            self.kernels.append(k, v, self._on_device(lengths))
            return
        counts = self._counts(k, lengths)
        require_chunk(self.spec, self.device, self.lengths, counts, k, v, query)
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
        """Tokens as the window holds them."""
        return tokens.detach().to(self.arrays.exact_keys.dtype)

    def advance(self, counts: int | Sequence[int] = 1) -> None:
        """Says that a CUDA graph which captured an append is about to be replayed: a replay counts on the GPU only.

        Args:
            counts: Tokens that each row gets.

        Raises:
            ValueError: For rows without room, or not one count a row.
        """
        given = (counts,) * self.rows if isinstance(counts, int) else row_integers(counts)
        if len(given) != self.rows or min(given, default=0) < 0:
            raise ValueError(f"expected a count of at least 0, or one for each of {self.rows} rows, got {counts}")
        require_room(self.spec, self.lengths, given)
        self.lengths, self.compressed = counters_after(self.spec, self.lengths, self.compressed, given)

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
        """Attention of the latest tokens over everything in the cache, causal; arguments as in `tq_jax.attend`.

        On the CPU JAX computes it; on a GPU torch launches the kernels, and `precise` chooses their arithmetic. There
        is no gradient: a backward pass that reaches the output raises NotImplementedError.
        """
        if torch.compiler.is_compiling():
            return custom_ops.attend(
                query, self._version, self._number, sliding_window, softcap, sink_logits, scale, lengths, precise
            )
        out = self.attend_now(
            query,
            sliding_window=sliding_window,
            softcap=softcap,
            sink_logits=sink_logits,
            scale=scale,
            lengths=lengths,
            precise=precise,
        )
        return custom_ops.refuse_gradient(out, query, sink_logits)

    def attend_now(
        self,
        query: torch.Tensor,
        *,
        sliding_window: int | None,
        softcap: float | None,
        sink_logits: torch.Tensor | None,
        scale: float | None,
        lengths: Lengths | None,
        precise: bool,
    ) -> torch.Tensor:
        """`attend`, outside of a graph."""
        if self.device.type != query.device.type:
            raise ValueError(f"expected a query on {self.device}, got one on {query.device}")
        if not self.is_capturing:
            self._counts(query, lengths)
        counts = self._on_device(lengths)
        if self.on_gpu:
            return self.kernels.attend(
                query, AttendOptions(sliding_window, softcap, scale, precise), sink_logits, counts
            )
        tensors = {"sink_logits": sink_logits, "lengths": counts}
        return jax_calls.attend(
            query, self.as_jax(), sliding_window=sliding_window, softcap=softcap, scale=scale,
            **{name: tensor for name, tensor in tensors.items() if tensor is not None},
        )  # fmt: skip

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
        host's time; what the graph reads and gives is copied, so that all else is as by the two calls.
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
        self.lengths, self.compressed = counters_after(self.spec, self.lengths, self.compressed, (1,) * self.rows)
        return custom_ops.refuse_gradient(out, query, sink_logits)

    @property
    def takes_tokens(self) -> bool:
        """Whether launches alone append a token to every row: on a GPU, with fixed statistics and room."""
        return self.on_gpu and self._ready and max(self.lengths, default=0) < self.spec.max_tokens

    def crop(self, length: int | Sequence[int]) -> None:
        """Drops the latest tokens, so that each row has at most `length`.

        Raises:
            ValueError: For a negative length or not one a row.
        """
        wanted = (length,) * self.rows if isinstance(length, int) else row_integers(length)
        if len(wanted) != self.rows or min(wanted, default=0) < 0:
            raise ValueError(f"expected a length of at least 0, or one for each of {self.rows} rows, got {length}")
        lengths = tuple(min(old, new) for old, new in zip(self.lengths, wanted, strict=True))
        pages = zip(self.compressed, lengths, strict=True)
        self._count(lengths, tuple(min(old, max(new - self.spec.sinks, 0)) for old, new in pages))

    def fork(self, *, graph_pool: GraphPool | None = None) -> "TorchCache":
        """An independent copy; quantizers, which never change, are shared. `graph_pool` as of the class."""
        copy = TorchCache.__new__(TorchCache)
        copy.device = self.device
        copy._adopt(map_rows(self.arrays, lambda tensor, _: tensor.clone()), graph_pool)
        return copy

    __copy__ = fork

    def __deepcopy__(self, memo: Any) -> "TorchCache":
        return self.fork(graph_pool=deepcopy(self._pool, memo))

    def __getstate__(self) -> dict[str, Any]:
        return {"arrays": self.arrays, "pool": self._pool}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.device = state["arrays"].length.device
        self._adopt(state["arrays"], state["pool"])

    def reorder(self, index: Sequence[int] | torch.Tensor) -> None:
        """Makes row i what row index[i] was; with another number of indices the number of rows changes.

        As many rows as there were are reordered in place, and only those that change are copied, as far as in use.

        Raises:
            ValueError: For indices outside the rows.
        """
        source = list(row_integers(index))
        if any(not 0 <= i < self.rows for i in source):
            raise ValueError(f"expected rows from 0 to {self.rows - 1}, got {source}")
        if len(source) != self.rows:
            places = torch.tensor(source, dtype=torch.int64, device=self.device)
            self._adopt(map_rows(self.arrays, lambda rows, _: rows[places]))
            return
        moved = {i: old for i, old in enumerate(source) if i != old}
        if not moved:
            return
        used = -(-max(self.compressed[old] for old in moved.values()) // self.spec.page_size)
        move_rows(self.arrays, moved, used)
        self.lengths = tuple(self.lengths[old] for old in source)
        self.compressed = tuple(self.compressed[old] for old in source)

    def reserve(self, max_tokens: int) -> None:
        """Makes room for max_tokens tokens a row, copying the pages in use if that is more than there is.

        Raises:
            ValueError: If the cache was made for fewer tokens than its sinks and window take, which would move.
        """
        old = self.spec
        if max_tokens <= old.max_tokens:
            return
        new = dataclasses.replace(old, max_tokens=max_tokens)
        if (new.sinks, new.ring) != (old.sinks, old.ring):
            raise ValueError(
                f"expected a cache of at least {new.sinks + new.ring} tokens to grow, got max_tokens={old.max_tokens}"
            )
        self._adopt(grow_pools(self.arrays, new, -(-max(self.compressed, default=0) // old.page_size)))

    def reset(self) -> None:
        """Empties every row, the statistics that it took from its tokens included."""
        self._count((0,) * self.rows, (0,) * self.rows)
        statistics = self.arrays.statistics
        if statistics is not None:
            for name, start in (("mean", 0), ("weight", 1), ("query_power", 0), ("query_count", 0), ("ready", False)):
                getattr(statistics, name).fill_(start)
            self._ready = False

    def state_dict(self) -> dict[str, Any]:
        """Every tensor by name, and the spec as text; tensors are the cache's own, not copies."""
        return named_tensors(self.arrays)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the file that `tq_jax.save_cache` writes, and raises as that does."""
        tq.save_cache(to_jax(jax.tree.map(lambda tensor: tensor.cpu(), self.arrays)), path)

    @classmethod
    def load(
        cls, path: str | os.PathLike, *, max_tokens: int | None = None, device: str | torch.device = "cpu"
    ) -> "TorchCache":
        """Reads what `save` or `tq_jax.save_cache` wrote; arguments and errors as in `tq_jax.load_cache`."""
        return cls.from_jax(tq.load_cache(path, max_tokens=max_tokens), device=device)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copies a state into this cache.

        Raises:
            ValueError: For another spec, missing or unknown names, or wrong shapes, types or counters; nothing has
                changed then.
        """
        load_tensors(self.arrays, state)
        self._adopt(self.arrays)

    @property
    def on_gpu(self) -> bool:
        """Whether torch launches the kernels; elsewhere JAX computes."""
        return self.device.type == "cuda"

    @property
    def is_capturing(self) -> bool:
        """Whether a CUDA graph is being captured, so that what is launched now does not run now."""
        return self.on_gpu and torch.cuda.is_current_stream_capturing()

    def _on_device(self, lengths: Lengths | None) -> torch.Tensor | None:
        if lengths is None or isinstance(lengths, torch.Tensor):
            return None if lengths is None else lengths.to(self.device, torch.int32)
        return torch.tensor(lengths, dtype=torch.int32, device=self.device)

    def _counts(self, chunk: torch.Tensor, lengths: Lengths | None) -> tuple[int, ...]:
        """Tokens of each row's chunk, or raises ValueError."""
        most = chunk.shape[1] if chunk.ndim == 4 else 0
        counts = (most,) * self.rows if lengths is None else row_integers(lengths)
        if len(counts) != self.rows or any(not 0 <= count <= most for count in counts):
            raise ValueError(f"expected {self.rows} lengths from 0 to {most}, got {list(counts)}")
        return counts

    def _count(self, lengths: tuple[int, ...], compressed: tuple[int, ...]) -> None:
        """Writes the counters, on the host and in the cache."""
        self.lengths, self.compressed = lengths, compressed
        self.arrays.length.copy_(torch.tensor(lengths, dtype=torch.int32))
        self.arrays.compressed.copy_(torch.tensor(compressed, dtype=torch.int32))
