"""CUDA graphs of whole decoding steps of a Hugging Face model over a `TurboQuantCache`.

    with decoding_graphs(model, cache):
        model.generate(**inputs, cache=cache)

With few rows, nearly all of the time of a token is spent on the host, which launches some thirty kernels per layer. A
replayed graph is one launch for all layers. A cache that grows by concatenation, like DynamicCache, cannot have graphs.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from interop.hf.cache import TurboQuantCache
from interop.hf.layer import CACHE_ARGUMENT, CompressedLayer
from interop.launcher.cuda_graph import TensorGraph

POSITIONS = {"position_ids": (1, 1), "cache_position": (1,)}
"""Arguments that a model derives from the number of tokens if they are not given, and their shapes."""


@contextlib.contextmanager
def decoding_graphs(model: Any, cache: TurboQuantCache) -> Iterator[None]:
    """In the block, decoding steps of a model over a cache are replayed from a CUDA graph; `generate` works as ever.

    The first call with given shapes and options runs as outside the block. The second call is captured, later calls
    are replayed, and after the cache has grown a call is captured anew. A call runs as outside the block if it has
    several tokens per row (a prompt, a chunk to verify), another cache, no room in the cache, a mask that changes the
    padding of earlier tokens, or gradients enabled.

    Inside the block, the weights must stay where they are. Hooks on parts of the model run when a graph is captured,
    not when it is replayed.

    Args:
        model: A model on one GPU, with the attention implementation of `interop.hf`.
        cache: A cache whose layers are all compressed.

    Raises:
        NotImplementedError: For a model that is not on one GPU or a cache with other layers; in the block, for a model
            that reads the number of tokens on the host or waits for the GPU.
    """
    _require_one_gpu(model)
    if any(type(layer) is not CompressedLayer for layer in cache.layers):
        raise NotImplementedError(
            f"CUDA graphs need a cache whose every layer is compressed and has no other state, got {cache.summary()}"
        )
    if any(layer.compression.dense for layer in cache.layers if isinstance(layer, CompressedLayer)):
        raise NotImplementedError("CUDA graphs hold attention that reads the codes, got a cache with dense=True")
    outside = vars(model).get("forward")
    model.forward = _Forward(model.forward, cache).wrapped()
    try:
        yield
    finally:
        del model.forward
        if outside is not None:
            model.forward = outside


def _require_one_gpu(model: Any) -> None:
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1 or next(iter(devices)).type != "cuda":
        raise NotImplementedError(f"CUDA graphs need a model on one GPU, got {sorted(map(str, devices))}")


class _Forward:
    """The forward pass of a model, with CUDA graphs of its decoding steps."""

    def __init__(self, forward: Callable, cache: TurboQuantCache) -> None:
        self._forward, self._cache = forward, cache
        self._layers: list[CompressedLayer] = cache.layers  # pyright: ignore[reportAttributeAccessIssue]
        self._parameters = list(inspect.signature(forward).parameters)
        self._graphs: dict[Any, TensorGraph | None] = {}
        self._kernels: list[Any] = []

    def wrapped(self) -> Callable:
        """The forward pass as a function with the signature of the model's own, which `generate` inspects."""

        @functools.wraps(self._forward)
        def forward(*given: Any, **named: Any) -> Any:
            named |= dict(zip(self._parameters, given, strict=False))
            tensors = self._tensors(named)
            return self._forward(**named) if tensors is None else self._step(named, tensors)

        return forward

    def _step(self, named: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Any:
        others = {name: value for name, value in named.items() if name not in tensors and not _is_mask_or_cache(name)}
        key = tuple((name, x.shape, x.dtype) for name, x in tensors.items()), tuple(others.items())
        try:
            hash(key)
        except TypeError:  # a list, for example, may change until the replay
            return self._forward(**named)
        kernels = [layer.cache.kernels for layer in self._layers if layer.cache is not None]
        if any(a is not b for a, b in zip(kernels, self._kernels, strict=False)):
            self._graphs.clear()  # the memory of the cache has moved
        self._kernels = kernels
        if key not in self._graphs:
            out = self._forward(**named)
            self._graphs[key] = None  # this call has loaded the kernels, which a capture must not
            return out
        graph = self._graphs[key] = self._graphs[key] or self._capture(others, tensors)
        graph.replay(list(tensors.values()))
        self._count()
        return tree_map_only(torch.Tensor, torch.clone, graph.out)

    def _tensors(self, named: dict[str, Any]) -> dict[str, torch.Tensor] | None:
        """The tensors that differ from token to token, by argument; None for a call that runs without a graph."""
        tokens = named.get("input_ids") if named.get("input_ids") is not None else named.get("inputs_embeds")
        layer, ours = self._layers[0], named.get(CACHE_ARGUMENT) is self._cache
        if not ours or torch.is_grad_enabled() or tokens is None or tokens.shape[1] != 1:
            return None
        if not all(each.cache is not None and each.cache.takes_tokens for each in self._layers):
            return None
        if not _goes_on(named.get("attention_mask"), layer):
            return None
        found = {n: x for n, x in named.items() if isinstance(x, torch.Tensor) and not _is_mask_or_cache(n)}
        for name in (name for name in POSITIONS if name in self._parameters):
            if name not in found and layer.real is not None:
                return None  # the model derives the positions of padded rows from the mask
            found.setdefault(name, torch.full(POSITIONS[name], layer.seen, device=tokens.device))
        return found

    def _capture(self, others: dict[str, Any], tensors: dict[str, torch.Tensor]) -> TensorGraph:
        rows, names = next(iter(tensors.values())).shape[0], list(tensors)

        def run(*given: torch.Tensor) -> Any:
            # Models take a mask of four dimensions as it is, without asking for the number of tokens.
            mask = torch.ones(rows, 1, 1, 1, dtype=torch.bool, device=given[0].device)
            named = dict(zip(names, given, strict=True)) | others | {CACHE_ARGUMENT: self._cache}
            return self._forward(attention_mask=mask, **named)

        try:
            with _captured(self._layers):
                return TensorGraph(run, list(tensors.values()), self._layers[0].compression.graph_pool)
        except RuntimeError as error:
            raise NotImplementedError(f"the model's decoding step cannot be a CUDA graph: {error}") from error

    def _count(self) -> None:
        real = self._layers[0].real
        if real is not None:
            real = torch.nn.functional.pad(real, (0, 1), value=True)
        for layer in self._layers:
            assert layer.cache is not None
            layer.cache.advance()
            layer.real, layer.seen = real, layer.seen + 1


@contextlib.contextmanager
def _captured(layers: list[CompressedLayer]) -> Iterator[None]:
    """Marks layers as captured, so that they count no tokens; the cache holds no padding, so masks are not needed."""
    kept = [(layer, layer.real, layer.seen) for layer in layers]
    for layer in layers:
        layer.is_captured, layer.real = True, None
    try:
        yield
    finally:
        for layer, real, seen in kept:
            layer.is_captured, layer.real, layer.seen = False, real, seen


def _is_mask_or_cache(name: str) -> bool:
    return name in ("attention_mask", CACHE_ARGUMENT)


def _goes_on(mask: torch.Tensor | None, layer: CompressedLayer) -> bool:
    """Whether a mask of all tokens hides the same tokens as before and shows the new ones."""
    if mask is None:
        return layer.real is None
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2 or mask.shape[1] != layer.seen + 1:
        return False
    shown = mask.to("cpu", torch.bool)
    before = shown[:, :-1].all() if layer.real is None else torch.equal(shown[:, :-1], layer.real)
    return bool(before) and bool(shown[:, -1].all())
