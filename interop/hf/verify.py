"""The claims of `tq-jax verify`: which layers of a model are compressed, its tokens, its divergence and its bytes."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from interop.hf.cache import TurboQuantCache
from interop.hf.dense import COST
from interop.hf.handle import ATTENTION
from interop.hf.measure import Row, Task, generate, label, make_cache, measure, require_supported
from tq_jax.commands.claims import Claim

EIGHT = (8.0, 8.0)
"""Bits of keys and values at which greedy tokens must be those of DynamicCache."""

MOST_KL_AT_EIGHT = 0.01
"""Largest mean KL divergence, in nats, that 8 bits may cost: what keeps greedy tokens as they are."""


class Verification:
    """Checks of one model, each of which measures some claims; they run in the order of `checks`.

    Args:
        task: The model with its text and its prompt.
        bits: Bits of keys and values that are to be used.
        most_kl: Largest mean KL divergence, in nats, that these bits may cost.

    Attributes:
        payload: Figures so far, as plain data.
    """

    def __init__(self, task: Task, bits: tuple[float, float], *, most_kl: float) -> None:
        self.task, self.bits, self.most_kl = task, bits, most_kl
        self.payload: dict[str, Any] = {}
        self._baseline: tuple[Any, Row] | None = None

    @property
    def checks(self) -> Sequence[Any]:
        """The checks."""
        return self.layers, self.tokens, self.divergence, self.memory

    def cache(self, bits: tuple[float, float] | None) -> Any:
        """A new cache, after the model's attention is set to the one that reads it; None is DynamicCache."""
        task = self.task
        if not task.dense:
            task.network.set_attn_implementation(task.attention if bits is None else ATTENTION)
        return make_cache(task.network, bits, dense=task.dense)

    def layers(self) -> Sequence[Claim]:
        """Layers that are compressed."""
        require_supported(self.task, [self.bits, EIGHT])
        cache: TurboQuantCache = self.cache(self.bits)
        chosen, kept = cache.compressed_layers, cache.kept_layers
        found = [{"layer": i, "compressed": i in chosen, "why_not": kept.get(i)} for i in sorted([*chosen, *kept])]
        self.payload["layers"] = found
        return [
            Claim(
                "layers compressed",
                len(chosen),
                ">=",
                1,
                note=cache.summary() + (f". {COST}" if self.task.dense else ""),
            )
        ]

    def tokens(self) -> Sequence[Claim]:
        """Greedy tokens against those of DynamicCache."""
        task = self.task
        exact = generate(task.network, task.asked, self.cache(None), task.new_tokens)[0]
        cache: TurboQuantCache = self.cache(EIGHT)
        ours = generate(task.network, task.asked, cache, task.new_tokens)[0]
        same = next((i for i, (a, b) in enumerate(zip(exact, ours, strict=True)) if a != b), len(exact))
        layers: list[Any] = [cache.layers[i] for i in cache.compressed_layers]
        read = min(max(layer.cache.compressed) for layer in layers)
        self.payload["tokens"] = {"DynamicCache": exact, label(EIGHT): ours}
        prompt = task.asked.shape[1]
        return [
            Claim(
                f"tokens read from codes, {label(EIGHT)}", read, ">=", 1,
                note=f"after a prompt of {prompt} tokens; the others lie in the window and the sinks",
            ),
            Claim(
                f"greedy tokens equal to DynamicCache's, {label(EIGHT)}", same, ">=", len(exact),
                note="" if same == len(exact) else f"the first other token is {ours[same]} in place of {exact[same]}",
            ),
        ]  # fmt: skip

    def divergence(self) -> Sequence[Claim]:
        """Divergence of the next token."""
        exact, _ = self._baseline = measure(self.task, None)
        rows = {label(bits): (measure(self.task, bits, exact)[1], most) for bits, most in self._bounds()}
        self.payload["rows"] = [
            dataclasses.asdict(row) for row in (self._baseline[1], *(row for row, _ in rows.values()))
        ]
        note = "mean over {} positions; largest {:.3g}, same top-1 {:.1%}"
        return [
            Claim(
                f"KL of the next token, {name}, nats", row.kl_mean, "<=", most,
                note=note.format(self.task.positions, row.kl_max, row.top1), details=dataclasses.asdict(row),
            )
            for name, (row, most) in rows.items()
        ]  # fmt: skip

    def _bounds(self) -> list[tuple[tuple[float, float], float]]:
        """Bits to measure, each with the divergence that it may cost."""
        chosen = (self.bits, self.most_kl)
        return [chosen] if self.bits == EIGHT else [chosen, (EIGHT, MOST_KL_AT_EIGHT)]

    def memory(self) -> Sequence[Claim]:
        """Bytes of both caches."""
        usual, ours = (row["nbytes"] for row in self.payload["rows"][:2])
        self.payload["bytes"] = {"DynamicCache": usual, label(self.bits): ours, "ratio": usual / ours}
        tokens = self.task.ids.shape[1]
        return [
            Claim(
                f"bytes of DynamicCache per byte of {label(self.bits)}", usual / ours, ">=", 1,
                note=f"{usual:,} and {ours:,} bytes after {tokens} tokens in {self._dtype}",
            )
        ]  # fmt: skip

    @property
    def _dtype(self) -> str:
        dtype: torch.dtype = self.task.network.dtype
        return str(dtype).removeprefix("torch.")
