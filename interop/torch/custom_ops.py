"""`append` and `attend` of a torch-owned cache as torch custom ops: torch.compile sees calls and not their code.

A graph holds a number and a version. The cache behind the number keeps everything else, its tensors too: a graph that
held them would copy them to make `append` functional. `append` writes the version and `attend` reads it, which keeps
them in order.
"""

import itertools
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from interop.torch.cache import TorchCache

_caches: "weakref.WeakValueDictionary[int, TorchCache]" = weakref.WeakValueDictionary()
_numbers = itertools.count()


def register(cache: "TorchCache") -> int:
    """The number of a cache, by which the ops find it as long as it lives."""
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
    return _caches[cache].attend_now(
        query,
        sliding_window=sliding_window,
        softcap=softcap,
        sink_logits=sink_logits,
        scale=scale,
        lengths=lengths,
        precise=precise,
    )


@attend.register_fake
def _(query, version, cache, sliding_window, softcap, sink_logits, scale, lengths, precise) -> torch.Tensor:
    return query.new_empty(query.shape)


class _Refusal(torch.autograd.Function):
    """The output, of which no gradient can be asked."""

    @staticmethod
    def forward(context: Any, output: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> Any:
        raise NotImplementedError("a compressed cache is for inference, got a gradient to pass back through it")


def refuse_gradient(output: torch.Tensor, *inputs: torch.Tensor | None) -> torch.Tensor:
    """The output of attention over a cache; if inputs need a gradient, it raises NotImplementedError for who asks."""
    known = [x for x in inputs if x is not None]
    if not torch.is_grad_enabled() or not any(x.requires_grad for x in known):
        return output
    return _Refusal.apply(output, *known)  # pyright: ignore[reportReturnType]
