"""`flax.nnx.MultiHeadAttention` with a compressed decode cache."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from pallas_kernels.layer.heads import turned
from tq_jax.append import append
from tq_jax.attention import attend
from tq_jax.cache import Cache, init_cache
from tq_jax.cache_spec import CacheSpec
from tq_jax.models.rope import rotary_turn
from tq_jax.nnx.checks import check_options, check_spec, rotary_base, take_shardings


@dataclasses.dataclass(frozen=True)
class RotaryAttention:
    """`nnx.dot_product_attention` over queries and keys that are turned by their positions 0, 1, ...

    `CompressedAttention(rope_base=...)` hands it to `nnx.MultiHeadAttention` as `attention_fn`, for calls without a
    cache. Two of the same base are equal, so that modules that hold them compile once.

    Attributes:
        base: Base of the frequencies of rotary embedding (half-split, see `tq_jax.models.rope`).

    Example:
        >>> q = k = v = jnp.ones((1, 5, 2, 8))
        >>> RotaryAttention(1e4)(q, k, v, is_causal=True).shape
        (1, 5, 2, 8)
    """

    base: float

    def __call__(
        self,
        query: Float[Array, "*batch t h_q d"],
        key: Float[Array, "*batch s h_kv d"],
        value: Float[Array, "*batch s h_kv d"],
        **options: Any,
    ) -> Float[Array, "*batch t h_q d"]:
        """Attends; options are those of `nnx.dot_product_attention`.

        Raises:
            NotImplementedError: For other than one batch axis.
        """
        if query.ndim != 4:
            raise NotImplementedError(f"rotary embedding is for one batch axis, got {query.ndim - 3} in {query.shape}")
        query, key = (turn(x, jnp.arange(x.shape[1], dtype=jnp.int32)[None], base=self.base) for x in (query, key))
        return nnx.dot_product_attention(query, key, value, **options)


def turn(x: Float[Array, "b t h d"], positions: Int[Array, "_ t"], *, base: float | None) -> Float[Array, "b t h d"]:
    """Rotary embedding of queries or keys at some positions; without a base they stay as they are."""
    if base is None:
        return x
    return turned(x, rotary_turn(positions, head_dim=x.shape[3], base=base))


class CompressedAttention(nnx.MultiHeadAttention):
    """Causal self-attention of Flax NNX whose decode cache is compressed.

    It has the parameters of `nnx.MultiHeadAttention`, so that weights and checkpoints of the one fit the other. Calls
    with `decode=False` are those of `nnx.MultiHeadAttention`. Calls with `decode=True` append any number of tokens to
    `self.cache`, an `nnx.Cache` that holds a `tq_jax.Cache`, and attend to what it holds: sink tokens and window in
    full precision, all other tokens from their codes, those of the same call too. `extend` does the same without state.

    Args:
        *args: Arguments of `nnx.MultiHeadAttention`: num_heads, in_features, qkv_features, out_features, num_kv_heads
            (grouped queries), in_kv_features.
        cache_spec: What the cache holds. `init_cache` sets its `max_tokens`. By default
            `CacheSpec.recommended(num_kv_heads, head_dim, max_tokens)`, with keys and values of 4 bits.
        rope_base: Base of rotary embedding inside the module, half-split: query and key of token i are turned by its
            position i, and the cache holds keys after that. None leaves them as they are. A base is also taken from
            `attention_fn=functools.partial(nnx.dot_product_attention_with_rope, rope=nnx.RoPE(base))`, where Flax has
            it.
        **options: Further arguments of `nnx.MultiHeadAttention`: decode, rngs, dtype, normalize_qk, ...

    Attributes:
        cache: The `nnx.Cache`; None before `init_cache`.
        cache_spec: The spec given, or None.
        rope_base: The base, or None.

    Raises:
        ValueError: For a spec of other KV heads or another head_dim, a rope_base that is not positive, or an odd
            head_dim with rope_base.
        NotImplementedError: For another attention_fn, for keys and values of other features than the queries, and for
            a spec with a sliding window.

    Example:
        >>> layer = CompressedAttention(4, 128, num_kv_heads=2, rope_base=1e4, decode=True, rngs=nnx.Rngs(0))
        >>> layer.init_cache((3, 512, 128))                             # 3 sequences of at most 512 tokens
        >>> step = nnx.jit(lambda layer, x: layer(x))
        >>> step(layer, jnp.ones((3, 200, 128))).shape                  # a prompt
        (3, 200, 128)
        >>> step(layer, jnp.ones((3, 1, 128))).shape                    # a token
        (3, 1, 128)
        >>> layer.cache.get_value().length.tolist()
        [201, 201, 201]
    """

    def __init__(
        self, *args: Any, cache_spec: CacheSpec | None = None, rope_base: float | None = None, **options: Any
    ) -> None:
        rope_base = rotary_base(rope_base, options.get("attention_fn"))
        if rope_base is not None:
            options["attention_fn"] = RotaryAttention(rope_base)
        super().__init__(*args, **options)
        check_spec(self, cache_spec, rope_base)
        self.cache_spec = cache_spec
        self.rope_base = rope_base
        self.cache: nnx.Cache[Cache] | None = nnx.data(None)

    def init_cache(self, input_shape: tuple[int, ...], dtype: Any = None, *, seed: int = 0) -> None:
        """Makes an empty cache in `self.cache`; a former one is dropped.

        Args:
            input_shape: (sequences, most tokens of a sequence, features), as for `nnx.MultiHeadAttention`.
            dtype: Type of full-precision tokens; by default that of the spec.
            seed: Seed of the quantizers, see `tq_jax.init_cache`.

        Raises:
            ValueError: For a shape that is not of three axes, or sizes or a dtype that do not fit a `CacheSpec`.
            NotImplementedError: For several batch axes, and for a head_dim that the quantizers do not support.
        """
        self.cache = nnx.Cache(self.make_cache(input_shape, dtype, seed=seed))

    def make_cache(self, input_shape: tuple[int, ...], dtype: Any = None, *, seed: int = 0) -> Cache:
        """An empty cache for `extend`; arguments and errors are those of `init_cache`."""
        if len(input_shape) > 3:
            raise NotImplementedError(f"the cache has one batch axis, got {len(input_shape) - 2} in {input_shape}")
        if len(input_shape) != 3 or input_shape[2] != self.in_features:
            raise ValueError(f"expected input_shape (sequences, tokens, {self.in_features}), got {input_shape}")
        batch, tokens, _ = input_shape
        spec = self.cache_spec or CacheSpec.recommended(self.num_kv_heads, self.head_dim, tokens)
        spec = dataclasses.replace(spec, max_tokens=tokens, window=spec.window if spec.compressed else tokens)
        if dtype is not None:
            spec = dataclasses.replace(spec, dtype=jnp.dtype(dtype).name)
        return init_cache(spec, batch=batch, seed=seed)

    def set_view(
        self,
        deterministic: bool | None = None,
        decode: bool | None = None,
        batch_size: int | tuple[int, ...] | None = None,
        max_length: int | None = None,
    ) -> None:
        """Class method used by `nnx.view`.

        Args:
            deterministic: If True, dropout is off.
            decode: If True, calls append to the cache and attend to it.
            batch_size: Sequences of the cache to make; with decode and max_length, and only if there is none.
            max_length: Most tokens of a sequence of the cache.

        Raises:
            ValueError: For one of batch_size and max_length without the other.
        """
        if (batch_size is None) != (max_length is None):
            raise ValueError(f"expected batch_size and max_length both or neither, got {batch_size} and {max_length}")
        if deterministic is not None:
            self.deterministic = deterministic
        if decode is not None:
            self.decode = decode
        if decode and self.cache is None and batch_size is not None and max_length is not None:
            batch = tuple(batch_size) if isinstance(batch_size, Sequence) else (batch_size,)
            self.init_cache((*batch, max_length, self.in_features))

    def __call__(
        self,
        inputs_q: Float[Array, "*batch t features"],
        inputs_k: Float[Array, "*batch s features"] | None = None,
        inputs_v: Float[Array, "*batch s features"] | None = None,
        *,
        decode: bool | None = None,
        lengths: Int[Array, "b"] | None = None,
        **options: Any,
    ) -> Float[Array, "*batch t out"]:
        """Attends: with `decode` to the cache, after the tokens are appended to it; otherwise as its base class does.

        Args:
            inputs_q: Inputs; with decode [sequences, tokens, features], any number of tokens.
            inputs_k: Inputs of the keys; with decode None, or inputs_q itself.
            inputs_v: Inputs of the values; with decode None, or inputs_q itself.
            decode: Whether to use the cache; by default as the module was made.
            lengths: With decode, tokens of each sequence that exist; the rest is right padding, is not stored, and its
                outputs mean nothing. By default all exist.
            **options: Further arguments of `nnx.MultiHeadAttention.__call__`.

        Returns:
            Outputs, [sequences, tokens, out_features]. Under jit, NaN for a sequence that found no room in the cache.

        Raises:
            ValueError: If decode is said nowhere, for lengths without decode, for decode before `init_cache`, and for
                chunks that `tq_jax.append` refuses.
            NotImplementedError: With decode, for cross-attention, a mask, input_positions, sown weights, and dropout.
        """
        decode = self.decode if decode is None else decode
        if decode is None:
            raise ValueError("expected decode as an argument of the call or the module, got None in both")
        if not decode:
            if lengths is not None:
                raise ValueError("expected lengths=None without decode (padding on the right is masked), got lengths")
            return super().__call__(inputs_q, inputs_k, inputs_v, decode=False, **options)
        check_options(self, inputs_q, (inputs_k, inputs_v), options)
        if self.cache is None:
            raise ValueError("expected init_cache before decode, got no cache")
        out, cache = self.extend(inputs_q, self.cache.get_value(), lengths=lengths, **take_shardings(options))
        self.cache.set_value(cache)
        return out

    def extend(
        self,
        inputs: Float[Array, "b t features"],
        cache: Cache,
        *,
        lengths: Int[Array, "b"] | None = None,
        qkv_sharding: Any = None,
        out_sharding: Any = None,
    ) -> tuple[Float[Array, "b t out"], Cache]:
        """Appends tokens to a cache and attends to it; nothing of the module changes.

        If a jitted function that donates the cache calls this function, the update happens in place.

        Args:
            inputs: Inputs of the latest tokens, any number.
            cache: From `make_cache`, or of the last call.
            lengths: Tokens of each sequence that exist; by default all.
            qkv_sharding: Sharding of queries, keys and values, as in `nnx.MultiHeadAttention`.
            out_sharding: Sharding of the outputs.

        Returns:
            Outputs and the new cache.

        Raises:
            ValueError: For shapes that do not fit, and, outside jit, for chunks without room.

        Example:
            >>> layer = CompressedAttention(4, 128, rngs=nnx.Rngs(0))
            >>> cache = layer.make_cache((1, 512, 128))
            >>> out, cache = layer.extend(jnp.ones((1, 7, 128)), cache)
            >>> out.shape, cache.length.tolist()
            ((1, 7, 128), [7])
        """
        if inputs.ndim != 3 or inputs.shape[2] != self.in_features or inputs.shape[0] != cache.rows:
            raise ValueError(f"expected inputs of shape ({cache.rows}, tokens, {self.in_features}), got {inputs.shape}")
        query, key, value = (x(inputs, out_sharding=qkv_sharding) for x in (self.query, self.key, self.value))
        if self.query_ln is not None and self.key_ln is not None:
            query, key = self.query_ln(query), self.key_ln(key)
        positions = cache.length[:, None] + jnp.arange(inputs.shape[1], dtype=jnp.int32)[None]
        query, key = (turn(x, positions, base=self.rope_base) for x in (query, key))
        with jax.named_scope("compressed_attention"):
            cache = append(cache, key, value, query=query, lengths=lengths)
            mixed = attend(query, cache, lengths=lengths)
        return self.out(mixed, out_sharding=out_sharding), cache
