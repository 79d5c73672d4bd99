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
from interop.torch.chunk import packed_splits
from pallas_kernels.attention import LogitOptions
from pallas_kernels.attention.decode.kernel_triton import Inputs
from pallas_kernels.attention.decode.launch_triton import MAX_QUERY_TOKENS, decode, decode_plan
from pallas_kernels.attention.merge_triton import MergeInputs, Splits, merge_plan, merge_splits
from pallas_kernels.attention.prepare_triton import Prepared, PrepareInputs, prepare, prepare_plan
from pallas_kernels.encode import launch_triton as encode
from pallas_kernels.encode.arguments import EncodeArguments
from pallas_kernels.pages import Pages
from pallas_kernels.tiles.rotation_triton import Basis
from tq_jax.attention import basis_of
from tq_jax.quantizer import encoder, sketch_gain


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedArrays:
    """What the kernels read of a layer, the same in every call; fields as those of `fused.CacheArrays`."""

    pages: Any
    key_basis: Basis | None
    value_basis: Basis | None
    sketch: Any


@dataclasses.dataclass(frozen=True)
class PagedAttend:
    """Attention over the pages of a block table; what is static, as a function of arrays.

    Few queries take three kernels: prepare, decode and merge. More take that for long chunks between the other two.
    """

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
        batch, count, _, dim = query.shape
        heads, scale = arrays.pages.keys.packed.shape[1], self.options.scale or float(np.float32(dim**-0.5))
        options = LogitOptions(scale, self.options.softcap, self.options.sliding_window)
        prepared = prepare(
            PrepareInputs(
                query=query, rows=None, counts=counts, length=lengths, compressed=lengths, keys=None, values=None,
                mean=mean, weight=weight, basis=arrays.key_basis, sketch=arrays.sketch,
            ),
            prepare_plan(
                query.shape, (batch, heads, 0, dim), np.float32, options=options, sinks=0, pages_per_row=table.shape[1],
                sketch_gain=sketch_gain(dim), interpret=self.interpret,
            ),
        )  # fmt: skip
        prepared = dataclasses.replace(prepared, table=table)  # it knows rows of pages only
        attend = self._attend_few if count <= MAX_QUERY_TOKENS else self._attend_many
        packed = attend(prepared, arrays.pages, options)
        merged = merge_splits(
            MergeInputs(packed=packed, basis=arrays.value_basis, sink_logits=sink_logits, counts=counts),
            merge_plan(
                query.shape, splits=packed.acc.shape[2], dtype=np.dtype(query.dtype).name, partial=False,
                interpret=self.interpret,
            ),
        )  # fmt: skip
        return (merged[0],)

    def _attend_few(self, prepared: Prepared, pages: Pages, options: LogitOptions) -> Splits:
        plan, num_warps, num_stages = decode_plan(
            prepared.query.shape, pages, prepared.table.shape[1], key_format=self.key.format,
            value_format=self.value.format, options=options, config=None, precise=self.options.precise,
            interpret=self.interpret,
        )  # fmt: skip
        inputs = Inputs(
            query=prepared.query, pages=pages, table=prepared.table, lengths=prepared.lengths,
            positions=prepared.positions, bias=prepared.bias, sketch=prepared.sketch,
        )  # fmt: skip
        return decode(inputs, prepared.query.shape[-1], plan, num_warps=num_warps, num_stages=num_stages)

    def _attend_many(self, prepared: Prepared, pages: Pages, options: LogitOptions) -> Splits:
        formats = self.key.format, self.value.format
        return packed_splits(prepared, pages, *formats, options=options, interpret=self.interpret)
