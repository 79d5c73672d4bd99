"""CUDA graphs of whole decoding steps of a Hugging Face model over a `TurboQuantCache`.

    with decoding_graphs(model, cache):
        model.generate(**inputs, cache=cache)

Where rows are few nearly all of a token's time is the host's, which launches some thirty kernels a layer. A replayed
graph is one launch for all layers; a cache that grows by concatenation, like DynamicCache, cannot have one.
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
"""Arguments, and their shapes, that a model makes of the number of tokens itself if it is not given them."""


@contextlib.contextmanager
def decoding_graphs(model: Any, cache: TurboQuantCache) -> Iterator[None]:
    """In the block, single tokens of a model over a cache are replayed from a CUDA graph; `generate` works as ever.

    The first token of its kind runs as it does outside, the second is captured, and again when the cache has grown.
    What is no single token (a prompt, a chunk to verify), has no room, changes the padding or wants a gradient, and
    calls with other caches run as they do outside.

    Meanwhile weights must stay where they are. Hooks on parts of the model run where a graph is captured, not where it
    is replayed.

    Args:
        model: On one GPU, with the attention implementation of `interop.hf`.
        cache: All its layers compressed.

    Raises:
        NotImplementedError: For a model elsewhere or a cache with other layers; and in the block for a model that reads
            the number of tokens on the host or waits for the GPU.
    """
    _require_one_gpu(model)
    if len(cache.compressed_layers) != len(cache.layers):
        raise NotImplementedError(f"CUDA graphs are of caches whose every layer is compressed, got {cache.summary()}")
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
        raise NotImplementedError(f"CUDA graphs are of models on one GPU, got {sorted(map(str, devices))}")


class _Forward:
    """A model's forward pass with graphs of its single tokens."""

    def __init__(self, forward: Callable, cache: TurboQuantCache) -> None:
        self._forward, self._cache = forward, cache
        self._layers: list[CompressedLayer] = cache.layers  # pyright: ignore[reportAttributeAccessIssue]
        self._parameters = list(inspect.signature(forward).parameters)
        self._graphs: dict[Any, TensorGraph | None] = {}
        self._kernels: list[Any] = []

    def wrapped(self) -> Callable:
        """As a function, with the signature of the model's own, which `generate` looks at."""

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
        except TypeError:  # lists and the like may change
            return self._forward(**named)
        kernels = [layer.cache.kernels for layer in self._layers if layer.cache is not None]
        if any(a is not b for a, b in zip(kernels, self._kernels, strict=False)):
            self._graphs.clear()  # memory has moved
        self._kernels = kernels
        if key not in self._graphs:
            out = self._forward(**named)
            self._graphs[key] = None  # what launches does so now, and has loaded what a capture must not
            return out
        graph = self._graphs[key] = self._graphs[key] or self._capture(others, tensors)
        graph.replay(list(tensors.values()))
        self._count()
        return tree_map_only(torch.Tensor, torch.clone, graph.out)

    def _tensors(self, named: dict[str, Any]) -> dict[str, torch.Tensor] | None:
        """What differs from token to token, by argument; None for what is to run without a graph."""
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
                return None  # positions of padded rows are the model's own affair
            found.setdefault(name, torch.full(POSITIONS[name], layer.seen, device=tokens.device))
        return found

    def _capture(self, others: dict[str, Any], tensors: dict[str, torch.Tensor]) -> TensorGraph:
        rows, names = next(iter(tensors.values())).shape[0], list(tensors)

        def run(*given: torch.Tensor) -> Any:
            # Four dimensions: a mask that is taken as it is, so that nothing asks how many tokens there are.
            mask = torch.ones(rows, 1, 1, 1, dtype=torch.bool, device=given[0].device)
            named = dict(zip(names, given, strict=True)) | others | {CACHE_ARGUMENT: self._cache}
            return self._forward(attention_mask=mask, **named)

        try:
            with _captured(self._layers):
                return TensorGraph(run, list(tensors.values()), self._layers[0].compression.graph_pool)
        except RuntimeError as error:
            raise NotImplementedError(f"the model's decoding step is no CUDA graph: {error}") from error

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
    """Lets a graph capture layers, which count nothing meanwhile: padding stays where it is, unseen by attention."""
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
    """Whether a mask of all tokens hides what was hidden and shows the new ones."""
    if mask is None:
        return layer.real is None
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2 or mask.shape[1] != layer.seen + 1:
        return False
    shown = mask.to("cpu", torch.bool)
    before = shown[:, :-1].all() if layer.real is None else torch.equal(shown[:, :-1], layer.real)
    return bool(before) and bool(shown[:, -1].all())
