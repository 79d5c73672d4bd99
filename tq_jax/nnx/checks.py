"""What `CompressedAttention` refuses."""

import functools
from typing import Any

from flax import nnx

from tq_jax.cache_spec import CacheSpec

WITHOUT_EFFECT = ("is_causal", "rngs")
"""Arguments of a call that change nothing with a cache: decode is causal, and has no dropout."""

SHARDINGS = ("qkv_sharding", "out_sharding")

REFUSED: dict[str, tuple[Any, str]] = {
    "mask": (None, "decode is causal and `lengths` says which tokens are padding; it takes no mask"),
    "input_positions": (None, "with a cache a token has the position at which it is appended"),
    "sow_weights": (False, "attention over codes has no array of weights to sow"),
}
"""Arguments of a call by name: the one value that a cache supports, and why."""


def rotary_base(rope_base: float | None, attention_fn: Any) -> float | None:
    """The base of rotary embedding, given or of an attention function of Flax.

    Raises:
        ValueError: For a base that is not above 0, or two of them.
        NotImplementedError: For an attention function that a cache cannot stand for.
    """
    if rope_base is not None and not rope_base > 0:
        raise ValueError(f"expected rope_base above 0, got {rope_base}")
    if attention_fn is None or attention_fn is nnx.dot_product_attention:
        return rope_base
    of_flax = getattr(nnx, "dot_product_attention_with_rope", None)
    partial = isinstance(attention_fn, functools.partial) and of_flax is not None and attention_fn.func is of_flax
    if not partial or attention_fn.args or set(attention_fn.keywords) != {"rope"}:
        raise NotImplementedError(
            "the cache stands for nnx.dot_product_attention, and for nnx.dot_product_attention_with_rope with rope= "
            f"and nothing else, got attention_fn={attention_fn!r}"
        )
    if rope_base is not None:
        raise ValueError(f"expected rope_base or an attention_fn with rope, got {rope_base=} and {attention_fn!r}")
    return float(attention_fn.keywords["rope"].theta)


def check_spec(module: Any, spec: CacheSpec | None, rope_base: float | None) -> None:
    """Raises an error if heads and features of an attention module do not fit a spec, or each other."""
    if module.in_kv_features != module.in_features:
        raise NotImplementedError(
            f"the cache is of self-attention: keys and values have the {module.in_features} features of the queries, "
            f"got in_kv_features={module.in_kv_features}"
        )
    expected = (module.num_kv_heads, module.head_dim)
    if spec is not None and (spec.num_kv_heads, spec.head_dim) != expected:
        raise ValueError(
            f"expected a cache_spec of (num_kv_heads, head_dim) {expected}, got {(spec.num_kv_heads, spec.head_dim)}"
        )
    if spec is not None and spec.sliding_window is not None:
        raise NotImplementedError(
            f"the module attends to all tokens, so that its cache keeps them: expected a cache_spec of "
            f"sliding_window=None, got {spec.sliding_window}"
        )
    if rope_base is not None and module.head_dim % 2:
        raise ValueError(f"expected an even head_dim with rope_base, got {module.head_dim}")


def check_options(module: Any, inputs: Any, others: tuple[Any, Any], options: dict[str, Any]) -> None:
    """Raises an error for arguments of a call that attention over a cache would have to ignore."""
    for name, other in zip(("inputs_k", "inputs_v"), others, strict=True):
        if other is not None and other is not inputs:
            raise NotImplementedError(f"with a cache keys and values are of inputs_q, got another {name}")
    for name, (only, why) in REFUSED.items():
        value = options.get(name, only)
        if value is not only:
            raise NotImplementedError(f"{why}: expected {name}={only}, got {getattr(value, 'shape', value)}")
    known = {*WITHOUT_EFFECT, *SHARDINGS, *REFUSED, "deterministic"}
    if unknown := sorted(set(options) - known):
        raise TypeError(f"expected arguments among {sorted(known)}, got {unknown}")
    deterministic = options.get("deterministic")
    deterministic = module.deterministic if deterministic is None else deterministic
    if module.dropout_rate > 0 and not deterministic:
        raise NotImplementedError(
            f"decode has no dropout: expected deterministic=True with dropout_rate={module.dropout_rate}, "
            f"got {deterministic}"
        )


def take_shardings(options: dict[str, Any]) -> dict[str, Any]:
    """The shardings among the arguments of a call."""
    return {name: options[name] for name in SHARDINGS if name in options}
