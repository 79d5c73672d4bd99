"""Pages of a serving engine on a GPU: encoded into and attended to by kernels that torch launches."""

import dataclasses
from typing import Any

import jax
import numpy as np
import torch
from jaxtyping import Float, Int

import tq_jax as tq
from interop.launcher.function import TorchFunction
from interop.launcher.program import BoundProgram
from interop.torch.attend_on_gpu import AttendOptions
from pallas_kernels.attention import MAX_QUERY_TOKENS, PagedArrays, attend_block_table
from pallas_kernels.encode import launch_triton as encode
from pallas_kernels.encode.arguments import EncodeArguments
from pallas_kernels.pages import Pages
from tq_jax.attention import attend_plan, basis_of
from tq_jax.quantizer import encoder


class PagedKernels:
    """The kernels of one layer.

    Args:
        pages: The pools, of tensors.
        key: Quantizer of keys, of JAX arrays.
        value: Quantizer of values.
        dtype: Type of the model's keys and values.
    """

    def __init__(self, pages: Pages, key: tq.Quantizer, value: tq.Quantizer, dtype: torch.dtype) -> None:
        self._specs, self._dtype = (key.spec, value.spec), dtype
        device: Any = jax.tree.leaves(pages)[0].device

        def tensor(leaf: Any) -> torch.Tensor:
            return leaf if isinstance(leaf, torch.Tensor) else torch.from_numpy(np.array(leaf)).to(device)

        self._arrays = jax.tree.map(tensor, PagedArrays(pages, basis_of(key), basis_of(value), key.sketch))
        self._encode = BoundProgram(PagedEncode(key, value), pages)
        self._attend: dict[Any, BoundProgram] = {}

    def write(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        slots: torch.Tensor,
        statistics: tuple[torch.Tensor, ...] | None,
    ) -> None:
        """Writes n tokens to their slots; arguments as of `PagedPool`."""
        # Few sizes, so that few are compiled; tokens of slot -1 are not written.
        size = 1 << (len(slots) - 1).bit_length()
        more = size - len(slots)
        slots = torch.nn.functional.pad(slots.int(), (0, more), value=-1)
        tokens = [torch.nn.functional.pad(x.to(self._dtype), (0, 0, 0, 0, 0, more)) for x in (keys, values)]
        given = (None, None) if statistics is None else [x.expand(size, *x.shape).contiguous() for x in statistics]
        self._encode(*(x[:, None].contiguous() for x in tokens), slots[:, None], *given)

    def attend(
        self,
        query: torch.Tensor,
        table: torch.Tensor,
        lengths: torch.Tensor,
        counts: torch.Tensor,
        options: AttendOptions,
        statistics: tuple[torch.Tensor, ...] | None,
        sink_logits: torch.Tensor | None,
    ) -> torch.Tensor:
        """Outputs of queries [b, t, h_q, d]; arguments as of `PagedPool`, the statistics' [b, h_kv, d]."""
        chunk = query.shape[1] > MAX_QUERY_TOKENS
        if (options, chunk) not in self._attend:
            kind = TorchFunction if chunk else None
            self._attend[options, chunk] = BoundProgram(PagedAttend(*self._specs, options), self._arrays, kind=kind)
        given = (None, None) if statistics is None else statistics
        return self._attend[options, chunk](query.contiguous(), table, lengths, counts, *given, sink_logits)[0]


class PagedEncode:
    """The encode kernels with their quantizers bound; equal for equal ones."""

    def __init__(self, key: tq.Quantizer, value: tq.Quantizer) -> None:
        self._encoders = encoder(key), encoder(value)
        leaves, structure = jax.tree.flatten(self._encoders)
        self._identity = structure, tuple(np.asarray(leaf).tobytes() for leaf in leaves)

    def __hash__(self) -> int:
        return hash(self._identity)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PagedEncode) and other._identity == self._identity

    def __call__(self, pages: Pages, keys: Any, values: Any, slots: Any, mean: Any, weight: Any) -> Pages:
        """The pages with tokens [n, 1, h_kv, d] in them."""
        key, value = self._encoders
        tokens = EncodeArguments(keys, values, slots, key=key, value=value, mean=mean, weight=weight)
        return encode.encode_pages(tokens, pages, interpret=False)


@dataclasses.dataclass(frozen=True)
class PagedAttend:
    """Attention over the pages of a block table, as a function of arrays with its static options bound."""

    key: tq.QuantizerSpec
    value: tq.QuantizerSpec
    options: AttendOptions
    interpret: bool = False

    def __call__(
        self,
        arrays: PagedArrays,
        query: Float[Any, "b t h_q d"],
        table: Int[Any, "b n"],
        lengths: Int[Any, "b"],
        counts: Int[Any, "b"],
        mean: Float[Any, "b h_kv d"] | None,
        weight: Float[Any, "b h_kv d"] | None,
        sink_logits: Any,
    ) -> tuple[Any]:
        """The outputs, see `PagedPool.attend`."""
        options, dim = self.options, query.shape[-1]
        heads, size = arrays.pages.keys.packed.shape[1:3]
        most = table.shape[1] * size
        # That of a cache whose tokens are all in pages.
        spec = tq.CacheSpec(heads, dim, most, self.key, self.value, window=0, sink_tokens=0, page_size=size)
        plan = attend_plan(spec, options.for_head_dim(dim), precise=options.precise, interpret=self.interpret)
        statistics = None if mean is None or weight is None else (mean, weight)
        out = attend_block_table(
            query, arrays, table, lengths, plan, counts=counts, statistics=statistics, sink_logits=sink_logits
        )
        return (out,)
