"""`append` and `attend` of a torch-owned cache as torch custom ops, so that torch.compile sees two opaque calls.

A compiled graph holds the number of a cache and a version tensor. It does not hold the cache's tensors, because
torch.compile would copy them to make `append` functional. `append` writes the version and `attend` reads it, which
keeps the two in order.
"""

import itertools
import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from interop.torch.attend_on_gpu import AttendOptions


class NumberedCache(Protocol):
    """The methods that the ops call on the cache that a number stands for; see `interop.torch.cache.TorchCache`."""

    def append_now(
        self, k: torch.Tensor, v: torch.Tensor, *, query: torch.Tensor | None, lengths: Sequence[int] | None
    ) -> None:
        """Appends a chunk outside of a compiled graph."""
        ...

    def attend_now(
        self,
        query: torch.Tensor,
        options: AttendOptions,
        *,
        sink_logits: torch.Tensor | None,
        lengths: Sequence[int] | None,
    ) -> torch.Tensor:
        """Attends outside of a compiled graph."""
        ...


_caches: weakref.WeakValueDictionary[int, NumberedCache] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def register(cache: NumberedCache) -> int:
    """Gives a cache a number; the ops find the cache by this number as long as the cache lives."""
    number = next(_numbers)
    _caches[number] = cache
    return number


@torch.library.custom_op("tq_jax::append", mutates_args={"version"})
def append(
    k: torch.Tensor,
    v: torch.Tensor,
    query: torch.Tensor | None,
    version: torch.Tensor,
    cache: int,
    lengths: Sequence[int] | None,
) -> None:
    """`TorchCache.append` of a numbered cache."""
    _caches[cache].append_now(k, v, query=query, lengths=lengths)
    version.add_(1)


@append.register_fake
def _(k, v, query, version, cache, lengths) -> None:
    return None


@torch.library.custom_op("tq_jax::attend", mutates_args=())
def attend(
    query: torch.Tensor,
    version: torch.Tensor,
    cache: int,
    sliding_window: int | None,
    softcap: float | None,
    sink_logits: torch.Tensor | None,
    scale: float | None,
    lengths: Sequence[int] | None,
    precise: bool,
) -> torch.Tensor:
    """`TorchCache.attend` of a numbered cache."""
    options = AttendOptions(sliding_window, softcap, scale, precise)
    return _caches[cache].attend_now(query, options, sink_logits=sink_logits, lengths=lengths)


@attend.register_fake
def _(query, version, cache, sliding_window, softcap, sink_logits, scale, lengths, precise) -> torch.Tensor:
    return query.new_empty(query.shape)


class _Refusal(torch.autograd.Function):
    """Identity whose backward pass raises."""

    @staticmethod
    def forward(context: Any, output: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> Any:
        raise NotImplementedError("a compressed cache is for inference, got a gradient to pass back through it")


def refuse_gradient(output: torch.Tensor, *inputs: torch.Tensor | None) -> torch.Tensor:
    """The output of attention over a cache; a backward pass from it to inputs raises NotImplementedError."""
    known = [x for x in inputs if x is not None]
    if not torch.is_grad_enabled() or not any(x.requires_grad for x in known):
        return output
    return _Refusal.apply(output, *known)  # pyright: ignore[reportReturnType]
