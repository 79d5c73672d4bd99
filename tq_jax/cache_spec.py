"""The contents of a cache: the spec, and the sizes that follow from it."""

import dataclasses
from typing import Any, Literal, get_args

import jax.numpy as jnp

from tq_jax.plain import flag, make_plain, whole
from tq_jax.quantizer import QuantizerSpec, require_choices
from tq_jax.recommended import recommended_quantizers

CacheDtype = Literal["bfloat16", "float16", "float32"]
KEY_KINDS, VALUE_KINDS = ("mse", "prod"), ("mse", "group")


@dataclasses.dataclass(frozen=True)
class CacheSpec:
    """The contents of a cache; static and hashable.

    `CacheSpec.recommended` makes the spec that the measurements use. The bare defaults of `QuantizerSpec` are the
    paper's Algorithm 1 with the scale of least error; everything else, step search too, is an option to set.

    Attributes:
        num_kv_heads: KV heads.
        head_dim: Channels of a head.
        max_tokens: Tokens that a row can be given.
        key: How keys are quantized, kind "mse" or "prod"; for "mse", scale None becomes "unbiased". If key and value
            are both None, everything stays in full precision (see `full_precision`).
        value: How values are quantized, kind "mse" or "group".
        window: Latest tokens kept in full precision.
        sink_tokens: First tokens kept in full precision.
        center_keys: Whether a mean is subtracted from the keys before they are quantized, see `tq_jax.statistics`.
        smooth_keys: Whether the channels of keys are weighted before they are quantized. The queries
            (`append(..., query=)`) tell which channels matter; without them only the spread of the keys is balanced.
        page_size: Tokens per page.
        dtype: Type of full-precision tokens.
        sliding_window: Tokens that a query ever sees, itself included; None for all. Older tokens are overwritten, so
            that the bytes of a row follow from the window and not from max_tokens. If chunks of t tokens are appended
            before their own queries attend, t - 1 tokens more are to be kept: sliding_window is then that of `attend`
            and t - 1.

    Raises:
        ValueError: For sizes that do not fit each other.
        NotImplementedError: For a kind that keys or values do not support.

    Example:
        >>> spec = CacheSpec.recommended(8, 128, max_tokens=32768, key_bits=4, value_bits=4)
        >>> full = CacheSpec.full_precision(num_kv_heads=8, head_dim=128, max_tokens=32768)
        >>> spec.bytes_per_token(), full.bytes_per_token()
        (1056, 4096)
        >>> prod = CacheSpec(num_kv_heads=8, head_dim=128, max_tokens=32768,
        ...                  key=QuantizerSpec(dim=128, bits=4, kind="prod"), value=QuantizerSpec(dim=128, bits=4))
        >>> prod.bytes_per_token()
        1072
        >>> local = CacheSpec.recommended(8, 128, max_tokens=32768, sliding_window=1024)
        >>> local.pages_per_row, spec.pages_per_row
        (8, 255)
    """

    num_kv_heads: int
    head_dim: int
    max_tokens: int
    key: QuantizerSpec | None
    value: QuantizerSpec | None
    window: int = 128
    sink_tokens: int = 4
    center_keys: bool = True
    smooth_keys: bool = True
    page_size: int = 128
    dtype: CacheDtype = "bfloat16"
    sliding_window: int | None = None

    def __post_init__(self) -> None:
        sizes = ("num_kv_heads", "head_dim", "max_tokens", "window", "sink_tokens", "page_size", "sliding_window")
        make_plain(self, **dict.fromkeys(sizes, whole), center_keys=flag, smooth_keys=flag)
        least = {"num_kv_heads": 1, "head_dim": 1, "max_tokens": 1, "window": 0, "sink_tokens": 0, "page_size": 1}
        if self.sliding_window is not None:
            least["sliding_window"] = 1
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"expected {name} of at least {low}, got {getattr(self, name)}")
        require_choices(self, dtype=get_args(CacheDtype))
        if (self.key is None) != (self.value is None):
            raise ValueError(f"expected key and value specs both or neither, got key={self.key}, value={self.value}")
        for name, spec, kinds in (("key", self.key, KEY_KINDS), ("value", self.value, VALUE_KINDS)):
            if spec is None:
                continue
            if spec.dim != self.head_dim:
                raise ValueError(f"expected a {name} spec of dim {self.head_dim} (head_dim), got dim={spec.dim}")
            if spec.kind not in kinds:
                raise NotImplementedError(f"{name}s are quantized with kind in {kinds}, got kind={spec.kind!r}")
        if self.key is not None and self.key.kind == "mse" and self.key.scale is None:
            object.__setattr__(self, "key", dataclasses.replace(self.key, scale="unbiased"))

    @classmethod
    def recommended(
        cls,
        num_kv_heads: int,
        head_dim: int,
        max_tokens: int,
        key_bits: float = 4,
        value_bits: float = 4,
        **fields: Any,
    ) -> "CacheSpec":
        """The recommended compressed cache: the one that demo and evaluation measure.

        Keys have the "unbiased" scale and values the "least_squares" scale, both with step search (see
        `recommended_quantizers`); keys are centred and smoothed; window and sink tokens are the defaults.

        Args:
            num_kv_heads: KV heads.
            head_dim: Channels of a head.
            max_tokens: Tokens that a row can hold.
            key_bits: Bits per key coordinate, see `QuantizerSpec`.
            value_bits: Bits per value coordinate.
            **fields: Further fields of `CacheSpec`: `window`, `dtype`, ..., or a whole `key` or `value` spec in place
                of its bits.

        Raises:
            ValueError: For sizes that do not fit each other.
            NotImplementedError: For bits and dimensions that `QuantizerSpec` does not support.

        Example:
            >>> spec = CacheSpec.recommended(8, 128, 32768, key_bits=4, value_bits=3, window=256)
            >>> spec.key.scale, spec.value.scale, spec.key.search, spec.center_keys
            ('unbiased', 'least_squares', True, True)
        """
        key, value = recommended_quantizers(head_dim, key_bits, value_bits)
        fields = {"key": key, "value": value, **fields}
        return cls(num_kv_heads, head_dim, max_tokens, **fields)

    @classmethod
    def full_precision(
        cls,
        *,
        num_kv_heads: int,
        head_dim: int,
        max_tokens: int,
        dtype: CacheDtype = "bfloat16",
        sliding_window: int | None = None,
    ) -> "CacheSpec":
        """A cache that keeps every token, or every token of a sliding window, in full precision: the baseline."""
        return cls(
            num_kv_heads, head_dim, max_tokens, None, None,
            window=max_tokens, sink_tokens=0, center_keys=False, smooth_keys=False, dtype=dtype,
            sliding_window=sliding_window,
        )  # fmt: skip

    def with_room(self, max_tokens: int) -> "CacheSpec":
        """The spec with room for another number of tokens per row; in full precision they are all in the window."""
        return dataclasses.replace(self, max_tokens=max_tokens, window=self.window if self.compressed else max_tokens)

    @property
    def compressed(self) -> bool:
        """Whether tokens that leave the window are quantized; False for `full_precision`."""
        return self.key is not None

    @property
    def sinks(self) -> int:
        """Sink slots: slots of the first tokens, in full precision."""
        return min(self.sink_tokens, self.max_tokens) if self.compressed else 0

    @property
    def ring(self) -> int:
        """Slots of the latest tokens, in full precision."""
        room = self.max_tokens - self.sinks
        wanted = self.window if self.compressed else self.sliding_window
        return room if wanted is None else min(wanted, room)

    @property
    def pages_per_row(self) -> int:
        """Pages of a row: they hold the max_tokens less sinks and ring, rounded up to whole pages.

        With a sliding window they hold no more than the window less the ring. A page is overwritten as a whole, by the
        first token of another, so that one page more is needed than such tokens fill.
        """
        if not self.compressed:
            return 0
        most = -(-(self.max_tokens - self.sinks - self.ring) // self.page_size)
        if self.sliding_window is None:
            return most
        return min(most, -(-max(self.sliding_window - 1 - self.ring, 0) // self.page_size) + 1)

    @property
    def kept_tokens(self) -> int:
        """Latest tokens of a row that it holds for certain: max_tokens, or at least those of the sliding window."""
        if not self.compressed:
            return self.ring
        pages = self.pages_per_row
        if pages * self.page_size >= self.max_tokens - self.sinks - self.ring:
            return self.max_tokens
        return self.ring + (pages - 1) * self.page_size + 1

    @property
    def has_statistics(self) -> bool:
        """Whether keys are centred or smoothed."""
        return self.compressed and (self.center_keys or self.smooth_keys)

    def bytes_per_token(self) -> int:
        """Bytes per compressed token of one layer: keys and values of all KV heads, scales included."""
        if self.key is None or self.value is None:
            return 2 * self.num_kv_heads * self.head_dim * jnp.dtype(self.dtype).itemsize
        return self.num_kv_heads * (self.key.bytes_per_vector + self.value.bytes_per_vector)
