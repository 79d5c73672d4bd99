"""Attention of Tunix's model families over a compressed cache: their projections, our cache."""

from typing import Any

import jax
from tunix.models.gemma import model as gemma
from tunix.models.gemma3 import model as gemma3
from tunix.models.llama3 import model as llama3
from tunix.models.qwen2 import model as qwen2
from tunix.models.qwen3 import model as qwen3
from tunix.utils import sharding_utils

from interop.tunix.cache import extend

Output = tuple[Any, jax.Array]


def require_no_segments(segment_ids: jax.Array | None) -> None:
    """Raises NotImplementedError for segment ids: a cache holds one sequence per row."""
    if segment_ids is not None:
        raise NotImplementedError(f"expected segment_ids=None with a cache, got an array of shape {segment_ids.shape}")


class Llama3Attention(llama3.Attention):
    """Attention of Llama 3."""

    def block(self, x: Any, segment_pos: Any, cache: Any, attn_mask: Any) -> Output:
        """Attends to the cache; without one, as Tunix does."""
        if cache is None:
            return super().block(x, segment_pos, cache, attn_mask)
        act, spec = llama3.shard, self.shd_config.act_btnh
        query, key, value = (act(project(x), spec) for project in (self.q_proj, self.k_proj, self.v_proj))
        query, key = (llama3.apply_rope(y, segment_pos, head_dim=self.head_dim) for y in (query, key))
        cache, mixed = extend(cache, query, key, value, attn_mask)
        return cache, act(self.o_proj(mixed), self.shd_config.act_btd)


class Qwen3Attention(qwen3.Attention):
    """Attention of Qwen 3, with norms of queries and keys."""

    def block(self, x: Any, segment_pos: Any, cache: Any, attn_mask: Any, segment_ids: Any = None) -> Output:
        """Attends to the cache; without one, as Tunix does."""
        if cache is None:
            return super().block(x, segment_pos, cache, attn_mask, segment_ids)
        require_no_segments(segment_ids)
        act, spec = qwen3.shard, self.shd_config.act_btnh
        query, key = self.q_norm(self.q_proj(x)), self.k_norm(self.k_proj(x))
        query, key, value = (act(y, spec) for y in (query, key, self.v_proj(x)))
        query, key = (qwen3.apply_rope(y, segment_pos, head_dim=self.head_dim) for y in (query, key))
        cache, mixed = extend(cache, query, key, value, attn_mask)
        return cache, act(self.o_proj(mixed), self.shd_config.act_btd)


class Qwen2Attention(qwen2.Attention):
    """Attention of Qwen 2 and 2.5, with biases."""

    def block(self, x: Any, cache: Any, attn_mask: Any, sin: Any, cos: Any, segment_ids: Any = None) -> Output:
        """Attends to the cache; without one, as Tunix does."""
        if cache is None:
            return super().block(x, cache, attn_mask, sin, cos, segment_ids)
        require_no_segments(segment_ids)
        act, spec, dtype = qwen2.shard, self.shd_config.act_btnh, self.config.dtype
        pairs = ((self.q_proj, self.q_bias), (self.k_proj, self.k_bias), (self.v_proj, self.v_bias))
        query, key, value = (
            act((y := project(x)) + bias[...].astype(dtype).reshape(1, 1, *y.shape[2:]), spec)
            for project, bias in pairs
        )
        query, key = (qwen2.apply_rotary_embedding(y, sin, cos) for y in (query, key))
        cache, mixed = extend(cache, query, key, value, attn_mask)
        return cache, act(self.o_proj(mixed), self.shd_config.act_btd)


def projected(attention: Any, x: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, keys and values of Gemma, from one einsum or two."""
    if attention.use_qkv_einsum:
        query, key, value = attention.qkv_einsum(x)
    else:
        query, (key, value) = attention.q_einsum(x), attention.kv_einsum(x)
    return query, key, value


def window_of(attention: Any, sliding: Any) -> int | None:
    """The sliding window of a layer of Gemma."""
    return attention.sliding_window_size if attention.attn_type == sliding else None


class GemmaAttention(gemma.Attention):
    """Attention of Gemma and Gemma 2, with sliding windows and soft-caps."""

    def block(self, x: Any, segment_pos: Any, cache: Any, attn_mask: Any) -> Output:
        """Attends to the cache; without one, as Tunix does."""
        if cache is None:
            return super().block(x, segment_pos, cache, attn_mask)
        act, spec = gemma.shard, self.shd_config.act_btnh
        query, key, value = (act(y, spec) for y in projected(self, x))
        query, key = (gemma.apply_rope(y, segment_pos, head_dim=self.head_dim) for y in (query, key))
        window = window_of(self, gemma.AttentionType.LOCAL_SLIDING)
        options = dict(sliding_window=window, softcap=self.attn_logits_soft_cap)
        cache, mixed = extend(cache, query, key, value, attn_mask, **options)
        return cache, act(self.attn_vec_einsum(mixed), self.shd_config.act_btd)


class Gemma3Attention(gemma3.Attention):
    """Attention of Gemma 3, with sliding windows, norms, and a rotary base per kind of layer."""

    def block(self, x: Any, segment_pos: Any, cache: Any, attn_mask: Any) -> Output:
        """Attends to the cache; without one, as Tunix does."""
        if cache is None:
            return super().block(x, segment_pos, cache, attn_mask)
        act, spec = sharding_utils.shard, self.shd_config.act_btnh
        query, key, value = (act(y, spec) for y in projected(self, x))
        rope = dict(base_frequency=self.rope_base_frequency, scale_factor=self.rope_scale_factor)
        query, key = (
            gemma3.apply_rope(norm(y), segment_pos, head_dim=self.head_dim, **rope)
            for norm, y in ((self._query_norm, query), (self._key_norm, key))
        )
        options = dict(
            sliding_window=window_of(self, gemma3.AttentionType.LOCAL_SLIDING), scale=self.query_pre_attn_scalar
        )
        cache, mixed = extend(cache, query, key, value, attn_mask, **options)
        return cache, act(self.attn_vec_einsum(mixed), self.shd_config.act_btd)


FAMILIES = (
    (llama3.Llama3, llama3.Attention, Llama3Attention),
    (qwen2.Qwen2, qwen2.Attention, Qwen2Attention),
    (qwen3.Qwen3, qwen3.Attention, Qwen3Attention),
    (gemma.Gemma, gemma.Attention, GemmaAttention),
    (gemma3.Gemma3, gemma3.Attention, Gemma3Attention),
)
"""Models, their attention, and ours in its place."""


def own_attention(model: Any) -> tuple[type, type]:
    """Attention of a model's family, and ours in its place.

    Raises:
        NotImplementedError: For another model.
    """
    for kind, theirs, ours in FAMILIES:
        if isinstance(model, kind):
            return theirs, ours
    names = [kind.__name__ for kind, _, _ in FAMILIES]
    raise NotImplementedError(f"models of Tunix are compressed that are one of {names}, got {type(model).__name__}")
