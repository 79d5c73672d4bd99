"""One layer of a `TurboQuantCache`: its compressed keys and values."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from transformers.cache_utils import CacheLayerMixin

import tq_jax as tq
from interop.hf.dense import store_and_read
from interop.hf.handle import Handle, LogitArguments
from interop.launcher.cuda_graph import GraphPool
from interop.torch.cache import TorchCache
from interop.torch.rows import bits_label

HEADROOM = 256
"""Tokens that a layer has room for beyond its prompt. A full layer grows by a quarter."""

SOME_DIM = 128
"""Head dimension with which options are checked before a layer knows its own."""

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
"""Major and minor version of transformers."""

CACHE_ARGUMENT = "cache" if VERSION >= (5, 24) else "past_key_values"
"""Name of the argument by which models and `generate` take a cache."""

CROP_COUNTS_REMOVED = VERSION >= (5, 0)
"""Whether `crop(n)` removes -n tokens, as in transformers 5; in version 4, n was the final length."""


_INTERRUPTED = (
    "expected as many tokens in all layers of a TurboQuantCache, got what an interrupted forward pass has left"
)


@dataclasses.dataclass(frozen=True)
class Compression:
    """How layers are compressed; one object for all layers of a cache.

    Attributes:
        key_bits: Bits per key coordinate.
        value_bits: Bits per value coordinate.
        max_tokens: Tokens per row that a layer has room for from the start; None to go by the prompt.
        seed: Seed of the quantizers.
        options: Further fields of `tq_jax.CacheSpec`.
        exact_prompt: Whether a prompt attends to its own keys and values before compression.
        model: Name of the model's class, for messages.
        dense: Whether layers return all keys and values as tensors, for attention that is not the cache's own.
        graph_pool: Memory of the CUDA graphs of all layers, which never run at the same time.
    """

    key_bits: float
    value_bits: float
    max_tokens: int | None
    seed: int
    options: dict[str, Any]
    exact_prompt: bool = True
    model: str = "the model"
    dense: bool = False
    graph_pool: GraphPool = dataclasses.field(default_factory=GraphPool)

    def spec(self, kv_heads: int, head_dim: int, prompt: int) -> tq.CacheSpec:
        """The spec of a layer.

        Args:
            kv_heads: KV heads of the layer.
            head_dim: Dimension of a head.
            prompt: Tokens of the first chunk.
        """
        options = ({"smooth_keys": False} if self.dense else {}) | self.options  # a dense layer knows no queries
        spec = tq.CacheSpec.recommended(kv_heads, head_dim, 1, self.key_bits, self.value_bits, **options)
        least = spec.sink_tokens + spec.window
        if self.max_tokens is not None:
            return dataclasses.replace(spec, max_tokens=max(self.max_tokens, least))
        pages = -(-max(prompt + HEADROOM - least, 0) // spec.page_size)
        return dataclasses.replace(spec, max_tokens=least + pages * spec.page_size)

    def describe(self) -> str:
        """Checks the options and returns the bits of keys and values, like K4/V4.

        Raises:
            ValueError: For values of options that no layer can have.
            NotImplementedError: For quantizers that are not supported, and for a dense cache that smooths keys.
        """
        if self.dense and self.options.get("smooth_keys"):
            raise NotImplementedError(
                "keys are smoothed by the queries, which a dense cache does not see, got dense=True and smooth_keys="
                f"{self.options['smooth_keys']}"
            )
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"expected max_tokens of at least 1, got {self.max_tokens}")
        given = [self.options.get(name) for name in ("key", "value")]
        return bits_label(self.spec(1, next((one.dim for one in given if one is not None), SOME_DIM), 1))


class CompressedLayer(CacheLayerMixin):
    """The compressed keys and values of one layer.

    Attributes:
        compression: How the layer is compressed.
        statistics: Mean and weight of the keys, [h_kv, d] each; None to take those of the prompt.
        cache: The tokens without padding, a cache row per row of the batch. None before the first chunk.
        real: bool [b, seen] on the CPU, which tokens so far are no padding; None if there is no padding.
        seen: Number of tokens so far, padding included.
        peers: All layers of the cache, compressed or not; None for a layer alone.
        is_captured: Whether `interop.hf.decoding_graphs` is capturing a CUDA graph of the model; it counts the tokens
            itself.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = True
    is_captured = False

    def __init__(self, compression: Compression, statistics: tuple[np.ndarray, np.ndarray] | None = None) -> None:
        super().__init__()
        self.compression, self.statistics = compression, statistics
        self.cache: TorchCache | None = None
        self.real: torch.Tensor | None = None
        self.seen = 0
        self.peers: list[Any] | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor | None = None) -> None:
        """Notes type and device; memory is taken with the first chunk, whose length is known then."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = self.values = key_states.new_empty(0)  # models with cross-attention ask layers for their numbers
        self.is_initialized = True

    def update(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Handle | torch.Tensor, Handle | torch.Tensor]:
        """Returns handles of the new tokens; the attention function, which knows queries and padding, stores them.

        A dense layer stores the tokens, as if none were padding, and returns all of its keys and values.
        """
        if key_states.shape != value_states.shape:
            raise NotImplementedError(
                f"keys and values of one shape are compressed, got {list(key_states.shape)} and "
                f"{list(value_states.shape)}"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.compression.dense:
            return store_and_read(self, key_states, value_states)  # pyright: ignore[reportCallIssue]
        return Handle(self, key_states), Handle(self, value_states)

    def store(self, query: torch.Tensor | None, k: torch.Tensor, v: torch.Tensor, real: torch.Tensor | None) -> None:
        """Appends a chunk without its padding.

        Args:
            query: Queries [b, h_q, t, d]; None if they are not known, for keys that are not smoothed.
            k: Keys [b, h_kv, t, d].
            v: Values, shaped like the keys.
            real: As for `real_tokens`: bool [b, tokens so far], False for padding; None if there is no padding.
        """
        cache, tokens, counts, _ = self._prepare((k, v) if query is None else (k, v, query), real)
        cache.append(*tokens[:2], query=None if query is None else tokens[2], lengths=counts)
        self.real, self.seen = real, self.seen + k.shape[2]

    def attend(
        self,
        query: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        real: torch.Tensor | None,
        logits: LogitArguments,
    ) -> torch.Tensor:
        """Appends a chunk and attends over the whole layer; arguments as for `store`.

        Returns:
            Outputs [b, t, h_q, d], zero for padding.
        """
        cache, tokens, counts, order = self._prepare((k, v, query), real)
        out = cache.extend(*tokens, lengths=counts, **_options(logits))
        self.real, self.seen = real, self.seen + k.shape[2]
        return out if order is None else _take(out, torch.argsort(order, dim=1))

    def attend_again(self, query: torch.Tensor, real: torch.Tensor | None, logits: LogitArguments) -> torch.Tensor:
        """Attends for the latest tokens, which are stored already, as layers that share keys and values do.

        Args:
            query: Queries [b, h_q, t, d] of the latest tokens.
            real: As for `store`.
            logits: Arguments that change the logits.

        Returns:
            Outputs [b, t, h_q, d], zero for padding.
        """
        assert self.cache is not None
        self.require_consistent(real)
        new = None if real is None else real[:, self.seen - query.shape[2] :]
        (query,), counts, order = _padding_last((query,), new)
        out = self.cache.attend(query, lengths=counts, **_options(logits))
        return out if order is None else _take(out, torch.argsort(order, dim=1))

    def _prepare(
        self, chunk: Sequence[torch.Tensor], real: torch.Tensor | None
    ) -> tuple[TorchCache, list[torch.Tensor], list[int] | None, torch.Tensor | None]:
        """Makes room for a chunk and moves its padding to the end.

        Returns:
            The cache; keys, values and queries, [b, t, h, d] each, real tokens first; number of real tokens of each
            row; position in the chunk of each of the moved tokens, int64 [b, t]. The last two are None without padding.
        """
        self._require_whole()
        self.require_consistent(real)
        tokens, counts, order = _padding_last(chunk, None if real is None else real[:, self.seen :])
        return self._make_room(chunk[0]), tokens, counts, order

    def _require_whole(self) -> None:
        """Raises RuntimeError if an interrupted forward pass has left some layers, or a part of this one, behind."""
        if self.cache is not None and not self.is_captured and max(self.cache.lengths) > self.seen:
            raise RuntimeError(f"{_INTERRUPTED}: empty the cache by `cache.reset()`")
        layers = [layer for layer in self.peers or () if isinstance(layer, CompressedLayer)]
        if not layers or layers[0] is not self:
            return
        found = sorted({layer.seen for layer in layers})
        if len(found) > 1:
            crops = found[0] > 0 and len(layers) == len(self.peers or ())
            keep = f"`for layer in cache.layers: layer.crop({found[0]})` keeps the first tokens, " if crops else ""
            raise RuntimeError(
                f"{_INTERRUPTED}, {found[0]} to {found[-1]} tokens in its layers: {keep}`cache.reset()` empties it"
            )

    def require_consistent(self, real: torch.Tensor | None) -> None:
        """Raises ValueError if a mask hides other tokens than the masks of earlier chunks."""
        if self.real is None and real is None:
            return
        before = torch.ones(1, self.seen, dtype=torch.bool, device="cpu") if self.real is None else self.real
        now = torch.ones(1, self.seen, dtype=torch.bool, device="cpu") if real is None else real[:, : self.seen]
        if not bool((before == now).all()):
            raise ValueError(
                f"expected the attention mask of the first {self.seen} tokens to be as before, "
                f"got another one (padding is not stored): {(~now).sum(1).tolist()} tokens hidden in each row, "
                f"{(~before).sum(1).tolist()} before"
            )

    def _make_room(self, k: torch.Tensor) -> TorchCache:
        count, how = k.shape[2], self.compression
        if self.seen == 0 and self.cache is not None and self.cache.rows != k.shape[0]:
            self.cache = None  # emptied, and now for another batch
        if self.cache is None:
            spec = how.spec(k.shape[1], k.shape[3], count)
            given = {} if self.statistics is None else {"statistics": tuple(map(jnp.asarray, self.statistics))}
            self.cache = TorchCache(
                spec, k.shape[0], seed=how.seed, device=k.device, graph_pool=how.graph_pool, **given
            )
        spec, needed = self.cache.spec, max(self.cache.lengths) + count
        if needed > spec.max_tokens:
            more = max(needed, spec.max_tokens + spec.max_tokens // 4) - spec.max_tokens
            self.cache.reserve(spec.max_tokens + -(-more // spec.page_size) * spec.page_size)
        return self.cache

    @property
    def attends_exactly(self) -> bool:
        """Whether the next tokens are a prompt that attends to its keys and values before compression."""
        return self.seen == 0 and self.compression.exact_prompt

    @property
    def nbytes(self) -> int:
        """Bytes of the cache: pages, windows, statistics, rotations and counters."""
        return 0 if self.cache is None else self.cache.nbytes

    def get_seq_length(self, cache_position: Any = None) -> int:
        """Number of tokens so far, padding included."""
        if self.is_captured:
            raise NotImplementedError("a CUDA graph of a model that reads the number of tokens on the host")
        return self.seen

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Length and offset of the keys that a mask covers; transformers 4.57 passes positions, not their number."""
        count = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.seen + count, 0

    def get_max_length(self) -> int:
        """-1, because there is no limit: the cache grows."""
        return -1

    get_max_cache_shape = get_max_length

    def crop(self, tokens_to_remove: int) -> None:
        """Drops the latest tokens.

        Args:
            tokens_to_remove: Minus the number of tokens to drop; a positive number is the number of tokens to keep.
                Zero drops none from transformers 5 on, and all before.
        """
        n = tokens_to_remove
        length = self.seen + n if n < 0 or (n == 0 and CROP_COUNTS_REMOVED) else n
        length = max(0, min(length, self.seen))
        if length == self.seen or self.cache is None:
            return
        if self.real is None:
            self.cache.crop(length)
        else:
            self.real = self.real[:, :length]
            self.cache.crop(self.real.sum(1).tolist())
        self.seen = length

    def reset(self) -> None:
        """Empties the layer. Memory is kept, unless statistics are known: a cache forgets them when it is emptied."""
        if self.statistics is not None:
            self.cache = None
        if self.cache is not None:
            self.cache.reset()
        self.real, self.seen = None, 0

    def _select(self, index: torch.Tensor) -> None:
        if self.cache is not None:
            self.cache.reorder(index.tolist())
        if self.real is not None:
            self.real = self.real[index.cpu()]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i continues row beam_idx[i]."""
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row, each time `repeats` times in succession."""
        rows = 0 if self.cache is None else self.cache.rows
        self._select(torch.arange(rows, device="cpu").repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the rows of these indices, in their order."""
        rows = 0 if self.cache is None else self.cache.rows
        self._select(torch.arange(rows, device="cpu")[indices.cpu()])

    def offload(self) -> None:
        """Raises NotImplementedError: the cache stays on its device."""
        raise NotImplementedError("a TurboQuantCache stays on its device, got offload()")

    prefetch = offload


def layer_bytes(layer: Any) -> int:
    """Bytes of all tensors of a layer, tensors in its dicts included."""
    return layer.nbytes if isinstance(layer, CompressedLayer) else tensor_bytes(vars(layer))


def tensor_bytes(tree: Any) -> int:
    """Bytes of all tensors of a pytree."""
    return sum(x.nbytes for x in jax.tree.leaves(tree) if isinstance(x, torch.Tensor))


def _options(logits: LogitArguments) -> dict[str, Any]:
    """The arguments as `TorchCache.attend` names them."""
    return {"softcap": logits.softcap, "sink_logits": logits.s_aux, "scale": logits.scaling}


def _padding_last(
    chunk: Sequence[torch.Tensor], new: torch.Tensor | None
) -> tuple[list[torch.Tensor], list[int] | None, torch.Tensor | None]:
    """Moves the padding of a chunk to its end.

    Args:
        chunk: Tensors [b, h, t, d] of the same tokens.
        new: bool [b, t] on the CPU, False for padding; None if there is no padding.

    Returns:
        The tensors [b, t, h, d], real tokens first; number of real tokens of each row; position in the chunk of each of
        the moved tokens, int64 [b, t]. The last two are None without padding.
    """
    tokens = [x.transpose(1, 2) for x in chunk]
    if new is None or bool(new.all()):
        return tokens, None, None
    order = torch.argsort((~new).int(), dim=1, stable=True).to(tokens[0].device)
    return [_take(x, order) for x in tokens], new.sum(1).tolist(), order


def _take(tokens: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Tokens [b, t, h, d], those of each row in the order [b, t]."""
    return torch.take_along_dim(tokens, order[:, :, None, None], dim=1)
