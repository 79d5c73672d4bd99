"""Kernels that torch would launch on a GPU, run by JAX or only recorded."""

import contextlib

import jax
import torch

from interop.launcher import program as launcher
from interop.torch.dlpack import to_jax, to_torch

GARBAGE = 0xFF
"""Byte of memory that no kernel may touch; NaN as a scale."""


class Interpreted:
    """Replaces `TorchProgram`: JAX runs the function, and its results are written to its first argument if alike."""

    made = 0

    def __init__(self, function, *examples, device):
        Interpreted.made += 1
        self._function, self._shapes = jax.jit(function), jax.tree.map(launcher.struct, examples)

    def check(self, tensors):
        inputs = tuple((leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(self._shapes))
        first = tensors[0]
        device = (first.tensor if isinstance(first, launcher.FirstPart) else first).device
        launcher.require_alike(tensors, inputs, device)

    def bind(self, fixed):
        def run(given, *, out=()):
            results = self.launch([*fixed, *given])
            return (*(x.copy_(y) for x, y in zip(out, results, strict=False)), *results[len(out) :])

        return run

    def launch(self, tensors):
        whole = [_whole(x, shape.shape) for x, shape in zip(tensors, jax.tree.leaves(self._shapes), strict=True)]
        arrays = jax.tree.unflatten(jax.tree.structure(self._shapes), to_jax(whole))
        results = self._function(*arrays)
        if jax.tree.structure(results) == jax.tree.structure(arrays[0]) and len(tensors) > 1:
            for old, new in zip(tensors, jax.tree.leaves(results), strict=False):
                _write(old, to_torch(new))
        return tuple(to_torch(jax.tree.leaves(results)))


def _write(old, new):
    """Copies results to an argument; of rows, what is the caller's, and what lies between it has to be as it was."""
    if not isinstance(old, launcher.StridedRows):
        old.copy_(new)
        return
    size, new = old.tensor[0].numel(), new.reshape(old.tensor.shape[0], -1)
    assert bool((new[:, size:].reshape(-1).view(torch.uint8) == GARBAGE).all())
    old.tensor.copy_(new[:, :size].reshape(old.tensor.shape))


def _whole(tensor, shape):
    """A copy; of the first part of an array, with a rest of garbage; of rows, with garbage between them."""
    if isinstance(tensor, launcher.StridedRows):
        flat = torch.full((tensor.shape.numel() * tensor.tensor.itemsize,), GARBAGE, dtype=torch.uint8)
        rows = flat.view(tensor.dtype).view(-1, tensor.tensor.stride(0))
        rows[: tensor.tensor.shape[0], : tensor.tensor[0].numel()] = tensor.tensor.flatten(1)
        return rows.reshape(shape)
    if tuple(tensor.shape) == tuple(shape):
        return tensor.detach().clone()
    value = torch.nan if tensor.is_floating_point() else GARBAGE
    garbage = torch.full((shape[0] - tensor.shape[0], *shape[1:]), value, dtype=tensor.dtype)
    return torch.cat([tensor.detach(), garbage])


class Replayed:
    """Replaces `TensorGraph`: a replay runs the function."""

    def __init__(self, function, examples, pool):
        self.function = function

    def replay(self, tensors):
        self.out = self.function(*(tensor.detach().clone() for tensor in tensors))


def record_launches(monkeypatch):
    """A list to which each launch adds the name of the kernel and its arguments; nothing is launched."""
    launched = []

    class Kernel:
        function, packed_metadata = "function", "metadata"

        def __init__(self, kernel):
            self.name = kernel.name

        def run(self, *given):
            launched.append((self.name, *given))

    monkeypatch.setattr(launcher, "compile_kernel", Kernel)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 7, raising=False)
    return launched
