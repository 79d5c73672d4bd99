"""The attention function of Hugging Face models over a `TurboQuantCache`, and the arguments that it refuses.

transformers hands an attention function the queries, the results of the cache's `update`, a mask and further arguments
of the model. Over a compressed layer none of them may be ignored. Masks are understood as causal with padding; a prompt
that attends exactly may also see later tokens, as image tokens of some models do. Padding is never stored. Over plain
tensors, which are those of encoders, stock caches and layers that are not compressed, attention is SDPA's.
"""

import dataclasses
import inspect
from typing import Any

import torch
import transformers
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from interop.hf.handle import ATTENTION, Handle, LogitArguments
from interop.torch.custom_ops import refuse_gradient

WITHOUT_MEANING = (
    "position_ids", "cache_position", "use_cache", "num_items_in_batch", "output_hidden_states", "logits_to_keep",
)  # fmt: skip
"""Arguments that attention does not depend on: rotary embedding has applied the positions already."""

SDPA_TAKES_BIASES = "position_bias" in inspect.signature(ALL_ATTENTION_FUNCTIONS["sdpa"]).parameters
"""Whether SDPA adds a bias of positions to the logits: that of transformers 4 ignores it."""

MASK_ROWS = 256
"""Queries whose mask is checked at once."""


def compressed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor | Handle,
    value: torch.Tensor | Handle,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention over a compressed layer; over keys and values that are tensors, exact attention.

    Args:
        module: The model's attention layer.
        query: Queries [b, h_q, t, d].
        key: Keys, as the cache's `update` returned them.
        value: Values, as the cache's `update` returned them.
        attention_mask: None for causal attention, or for attention to all of `key` if the layer or `is_causal` says so;
            or [b, 1, t, s], bool or added to the logits.
        scaling: Factor of the logits; 1 / sqrt(d) by default.
        dropout: Must be 0 for a compressed layer.
        softcap: Soft-cap: a logit x becomes softcap * tanh(x / softcap).
        s_aux: Sink logits [h_q].
        sliding_window: Sliding window of a layer that is not compressed; the mask applies it.
        others: Further arguments of the model. SDPA gets them for tensors; for a compressed layer they are refused
            unless they are known not to change attention.

    Returns:
        Outputs [b, t, h_q, d], and None for the attention weights.

    Raises:
        NotImplementedError: For an argument that changes attention and is not supported.
    """
    logits = LogitArguments(scaling, softcap, s_aux)
    if isinstance(key, torch.Tensor) and isinstance(value, torch.Tensor):
        return exact_attention(module, query, key, value, attention_mask, logits, dropout=dropout, **others), None
    assert isinstance(key, Handle) and isinstance(value, Handle)
    _refuse_unknown(others)
    if dropout:
        raise NotImplementedError(f"a TurboQuantCache is for inference, got dropout={dropout}")
    if query.shape[2] > key.tokens.shape[2] or (query.shape[2] < key.tokens.shape[2] and not key.is_stored):
        raise NotImplementedError(
            f"a TurboQuantCache is for attention of tokens to each other, got {query.shape[2]} queries and "
            f"{key.tokens.shape[2]} new keys, as in cross-attention"
        )
    is_causal = _is_causal(module, others)
    if attention_mask is None and query.shape[2] > 1 and not is_causal and not key.attends_exactly:
        raise NotImplementedError(f"a TurboQuantCache is for causal attention, got is_causal=False{_LATER}")
    if sliding_window is not None and (sliding_window < key.shape[2] or key.layer.is_captured):
        raise NotImplementedError(f"compressed layers see all tokens, got sliding_window={sliding_window}")
    out = _attend_packed(module, query, key, value, attention_mask, logits, is_causal)  # pyright: ignore[reportCallIssue]
    return out, None


@torch.compiler.disable  # a compiled graph cannot hold what the host keeps of a cache
def _attend_packed(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: Handle,
    value: Handle,
    mask: torch.Tensor | None,
    logits: LogitArguments,
    is_causal: bool,
) -> torch.Tensor:
    """Stores the new tokens in a compressed layer, unless it holds them already, and attends over it."""
    layer = key.layer
    if layer.cache is not None and layer.cache.is_capturing and not layer.is_captured:
        raise NotImplementedError(
            "a CUDA graph of a model over a TurboQuantCache: masks are read on the host "
            "(interop.hf.decoding_graphs has one)"
        )
    if layer.is_captured:
        mask = None  # `decoding_graphs` looks at the mask of every token itself
    exact, again = key.attends_exactly, key.is_stored
    real = real_tokens(mask, query.shape[0], query.shape[2], key.shape[2], asked_by=module, may_see_later=exact)
    if exact:  # a prompt attends to its keys before compression
        if mask is None and is_causal:
            mask = _mask_of_latest(query, key.tokens)
        is_causal = is_causal and query.shape[2] > 1  # one query is that of the latest token, which sees all
        out = exact_attention(module, query, key.tokens, value.tokens, mask, logits, is_causal=is_causal)
        if again:
            layer.require_consistent(real)
        else:
            layer.store(query, key.tokens, value.tokens, real)
        return out
    if again:
        return refuse_gradient(layer.attend_again(query, real, logits), key.tokens, value.tokens)
    return refuse_gradient(layer.attend(query, key.tokens, value.tokens, real, logits), key.tokens, value.tokens)


def _mask_of_latest(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor | None:
    """Causal mask [1, 1, t, s] of queries of the latest tokens; None for queries of all tokens or of one."""
    count, keys = query.shape[2], key.shape[2]
    if count in (1, keys):
        return None
    return torch.ones(count, keys, dtype=torch.bool, device=query.device).tril(keys - count)[None, None]


def exact_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    arguments: LogitArguments,
    *,
    dropout: float = 0.0,
    **others: Any,
) -> torch.Tensor:
    """Attention over keys and values [b, h_kv, s, d]: SDPA, which has no soft-cap and no sink logits, or plain torch.

    Args:
        module: The model's attention layer.
        query: Queries [b, h_q, t, d].
        key: Keys.
        value: Values.
        mask: As for `compressed_attention`.
        arguments: What changes the logits.
        dropout: Share of the weights that SDPA drops.
        others: Further arguments of the model; SDPA gets them.

    Returns:
        Outputs [b, t, h_q, d].

    Raises:
        NotImplementedError: For dropout or an argument that plain torch does not know, and for a bias that SDPA of
            older releases of transformers ignores.
    """
    if mask is not None:
        others.pop("is_causal", None)  # the mask says it, and SDPA of transformers 4 takes one of both
    if others.get("position_bias") is not None and not SDPA_TAKES_BIASES:
        raise NotImplementedError(
            f"SDPA of transformers {transformers.__version__} ignores position_bias="
            f"{_short(others['position_bias'])}: pip install 'transformers>=5'"
        )
    scaling, softcap, s_aux = arguments.scaling, arguments.softcap, arguments.s_aux
    if softcap is None and s_aux is None:
        sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return sdpa(module, query, key, value, mask, dropout=dropout, scaling=scaling, **others)[0]
    _refuse_unknown(others)
    if dropout:
        raise NotImplementedError(f"attention with a soft-cap or sink logits has no dropout here, got {dropout}")
    batch, heads, count, dim = query.shape
    grouped = query.reshape(batch, key.shape[1], -1, count, dim)
    logits = torch.einsum("bhgtd,bhsd->bhgts", grouped, key).float() * (dim**-0.5 if scaling is None else scaling)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if (
        mask is None and count > 1 and _is_causal(module, others)
    ):  # a static cache has more keys than queries; the last ones are not written yet
        mask = torch.ones(count, key.shape[2], dtype=torch.bool, device=query.device).tril()[None, None]
    if mask is not None:
        mask = mask[:, :, None, :, : key.shape[2]]
        logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min) if mask.dtype == torch.bool else logits + mask
    if s_aux is not None:
        sinks = s_aux.reshape(1, key.shape[1], -1, 1, 1).to(logits).expand(batch, -1, -1, count, 1)
        logits = torch.cat([logits, sinks], -1)
    weights = torch.softmax(logits, -1)[..., : key.shape[2]].to(value.dtype)
    out = torch.einsum("bhgts,bhsd->bthgd", weights, value)
    return out.reshape(batch, count, heads, value.shape[-1])


def _is_causal(module: torch.nn.Module, others: dict[str, Any]) -> bool:
    """Whether attention without a mask is causal: what the model says in the call, or else its layer."""
    given = others.get("is_causal")
    return bool(getattr(module, "is_causal", True) if given is None else given)


def _refuse_unknown(others: dict[str, Any]) -> None:
    """Raises NotImplementedError for an argument that may change attention."""
    for name, given in others.items():
        if name not in (*WITHOUT_MEANING, "is_causal") and given is not None and given is not False:
            raise NotImplementedError(f"attention over a TurboQuantCache does not know {name}={_short(given)}")


_LATER = (
    " (blocks of tokens that see later ones, as images in some models, belong to the prompt of an exact_prompt cache)"
)


def real_tokens(
    mask: torch.Tensor | None,
    batch: int,
    queries: int,
    keys: int,
    *,
    asked_by: object = None,
    may_see_later: bool = False,
) -> torch.Tensor | None:
    """Reads which tokens are real, not padding, from a causal mask with padding.

    Args:
        mask: None for causal attention without padding; or [b, 1, queries, keys], bool or added to the logits.
        batch: Number of cache rows.
        queries: Number of new tokens.
        keys: Number of tokens so far, the new ones included.
        asked_by: A layer of the model. The layers of one pass share the result; if a layer asks again about the same
            mask, the mask is read again. None shares nothing.
        may_see_later: Whether queries may see later tokens as well, as in bidirectional prefixes and blocks.

    Returns:
        bool [b, keys] on the CPU, False for padding; None if there is no padding.

    Raises:
        NotImplementedError: For any other mask: biases, packed sequences, windows.
    """
    if mask is None:
        return None
    version = None if mask.is_inference() else mask._version  # inference tensors do not count writes
    known: _Known | None = getattr(mask, "_tq_real", None) if asked_by is not None else None
    read = version, queries, keys, may_see_later
    if known is not None and known.read == read and id(asked_by) not in known.askers:
        known.askers.add(id(asked_by))
        return known.real
    if mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[2] != queries or mask.shape[3] != keys:
        raise NotImplementedError(f"expected a mask [{batch}, 1, {queries}, {keys}], got {list(mask.shape)}")
    seen = mask[:, 0]
    if mask.dtype != torch.bool:
        if not mask.is_floating_point():
            raise NotImplementedError(f"expected a mask of bool or floating point, got {mask.dtype}")
        if not bool(((seen == 0) | (seen <= torch.finfo(mask.dtype).min / 2)).all()):
            raise NotImplementedError(
                "attention over a TurboQuantCache does not know biases, got a mask of other values"
            )
        seen = seen == 0
    real = seen[:, -1]
    position = torch.arange(keys, device=mask.device)
    for start in range(0, queries, MASK_ROWS):
        rows = seen[:, start : start + MASK_ROWS]
        last = keys - queries + start + torch.arange(rows.shape[1], device=mask.device)
        causal = (position <= last[:, None]) & real[:, None]
        missing, extra = causal & ~rows, rows & ~causal
        if may_see_later:
            extra = extra & ~real[:, None]
        if bool((missing | extra).any()):
            raise NotImplementedError(
                "expected a causal mask with padding, got another pattern" + ("" if may_see_later else _LATER)
            )
    found = None if bool(real.all()) else real.expand(batch, keys).cpu()
    if asked_by is not None:
        mask._tq_real = _Known(found, read, {id(asked_by)})  # pyright: ignore[reportAttributeAccessIssue]
    return found


@dataclasses.dataclass(frozen=True)
class _Known:
    """Result of reading a mask.

    Attributes:
        real: What `real_tokens` returns.
        read: Version of the mask when it was read, its queries, its keys, and whether queries may see later tokens.
        askers: Ids of the layers that have asked since.
    """

    real: torch.Tensor | None
    read: tuple[int | None, int, int, bool]
    askers: set[int]


def _short(value: Any) -> str:
    return f"{value.dtype}{list(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)[:60]


AttentionInterface.register(ATTENTION, compressed_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)  # without it, transformers drops the mask and so the padding
