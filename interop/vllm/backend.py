"""The attention backend as vLLM sees it, and the attention of a layer over compressed pages."""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import numpy as np
import torch
from vllm.config import get_current_vllm_config, set_current_vllm_config
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl, AttentionType, MultipleOf
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig
from vllm.v1.kv_cache_interface import KVCacheLayout  # pyright: ignore[reportPrivateImportUsage]

import tq_jax as tq
from interop.torch.attend_on_gpu import AttendOptions
from interop.torch.paged import PagedPool
from interop.torch.paged_rows import HotPool
from interop.vllm.bias_statistics import Owner, bias_statistics
from interop.vllm.calls import UniformCall
from interop.vllm.dense_space import DenseSpace
from interop.vllm.metadata import TurboQuantBuilder, TurboQuantMetadata
from interop.vllm.options import Options
from interop.vllm.prompts import PromptAttention
from interop.vllm.report import identity_of
from interop.vllm.window import reserve, window_of
from tq_jax.quantizer import MAX_DIM, MIN_DIM
from tq_jax.statistics_files import find_statistics, read_statistics

if current_platform.is_cuda() and jax.config.jax_platforms is None:  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_platforms", "cpu")  # torch launches the kernels; JAX must not take GPU memory


class TurboQuantBackend(AttentionBackend):
    """The backend of a layer before its weights are loaded; `for_options` makes the backend of a compressed layer."""

    forward_includes_kv_cache_update = False
    supported_dtypes: ClassVar = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar = ["auto"]

    def __init_subclass__(cls, *, of_this_package: bool = False, **options: Any) -> None:
        """Refuses backends that vLLM derives for layers with other attention, before any weight is loaded."""
        super().__init_subclass__(**options)
        if not of_this_package:
            model = get_current_vllm_config().model_config
            raise NotImplementedError(
                f"layers with attention that is not plainly causal ({cls.__name__}) are not compressed, got "
                f"{model.architectures if model else 'a model'}: serve it without --attention-backend CUSTOM"
            )

    @staticmethod
    def get_name() -> str:
        """Name of the backend's member of `AttentionBackendEnum`."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> Any:
        """The class that runs in a layer."""
        return TurboQuantImpl

    @staticmethod
    def get_builder_cls() -> Any:
        """The class that makes the metadata of a step."""
        return TurboQuantBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        """Multiples of 32 keep every array of a block aligned to 64 bytes."""
        return [MultipleOf(32)]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """Multiples of 64: a tile of the prefill kernel then lies in one block."""
        return default_block_size if default_block_size % 64 == 0 else 64

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """The layouts in which a block of a layer is one run of bytes, at any distance from the next one."""
        return (KVCacheLayout.LBHNC, KVCacheLayout.BLHNC)

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        """Whether there are quantizers of this dimension."""
        return MIN_DIM <= head_size <= MAX_DIM

    @classmethod
    def supports_sink(cls) -> bool:
        """Sink logits take part in the softmax."""
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """Sliding windows are honoured."""
        return True

    @classmethod
    def supports_kv_connector(cls) -> bool:
        """Connectors move blocks, which are runs of bytes."""
        return True

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        """Requests are split into runs and prompts by the query lengths on the host, so these must be right."""
        return False

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """The spec as it is: how the layer is compressed is not known yet."""
        return spec


@functools.cache
def for_options(options: Options, *, beside_windows: bool = False) -> type[TurboQuantBackend]:
    """The backend of layers compressed by given options; equal options give the same class.

    Args:
        options: The options.
        beside_windows: Whether layers with a sliding window stay in full precision beside these.
    """

    class TurboQuantLayers(TurboQuantBackend, of_this_package=True):
        @classmethod
        def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
            """Beside larger blocks of other layers, first the layout that does not pad all blocks to the largest."""
            layouts = super().supported_kv_cache_layouts()
            return layouts[::-1] if beside_windows else layouts

        @classmethod
        def customize_spec(cls, spec: Any) -> Any:
            """Sets the true bytes per token; the type stays the model's, because vLLM zeroes blocks of mixed types."""
            if spec.head_size_v != spec.head_size:
                raise NotImplementedError(
                    f"keys and values of one size are compressed, got {spec.head_size} and {spec.head_size_v}"
                )
            return dataclasses.replace(
                spec, state_content_bytes=options.content_bytes(spec.head_size, spec.dtype.itemsize)
            )

    return TurboQuantLayers


class TurboQuantImpl(AttentionImpl[TurboQuantMetadata]):
    """The attention of one layer: compresses new tokens into vLLM's pages and attends over the pages.

    Arguments are those of vLLM's `AttentionImpl`.

    Attributes:
        layer_index: Index of the layer in the model; known once weights are loaded.
        written: Tokens written so far.
        attended: Queries attended with so far.
        statistics: Mean and weight of the keys, [h_kv, d] each; None if keys are stored as they are, and until weights
            are loaded.
        statistics_from: File of the statistics, or "their bias"; None without statistics.

    Raises:
        NotImplementedError: For an argument that has a meaning here but is not supported.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: Any = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
        **others: Any,
    ) -> None:
        refused = {
            "alibi_slopes": alibi_slopes,
            "kv_sharing_target_layer_name": kv_sharing_target_layer_name,
            "kv_cache_dtype": None if kv_cache_dtype == "auto" else kv_cache_dtype,
            "attn_type": None if attn_type == AttentionType.DECODER else attn_type,
            **others,
        }
        for name, value in refused.items():
            if value is not None and value is not False:
                raise NotImplementedError(f"attention over compressed pages does not know {name}={value!r:.80}")
        self._config = get_current_vllm_config()
        self.options = Options.from_config(self._config.additional_config)
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.sliding_window, self.sinks = sliding_window, sinks
        self.kv_cache_dtype = kv_cache_dtype
        self._attend_options = AttendOptions(
            sliding_window, logits_soft_cap or None, self.scale, precise=self.options.precise
        )
        dtype = self._config.model_config.dtype if self._config.model_config is not None else torch.float32
        space = DenseSpace.of(self._config, self.num_kv_heads, head_size, dtype)
        self._attend_prompts = PromptAttention(space, self._attend_options)
        # Kept to make another implementation of the same layer.
        self._arguments = (
            num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window, kv_cache_dtype, logits_soft_cap,
            attn_type, kv_sharing_target_layer_name,
        )  # fmt: skip
        self.layer_index: int | None = None
        self.written = self.attended = 0
        self.statistics: tuple[torch.Tensor, torch.Tensor] | None = None
        self.statistics_from: str | None = None
        self._owner = Owner(self)
        self._pool: PagedPool | None = None
        self._hot: HotPool | None = None
        self._memory: tuple[int, torch.Size] | None = None
        self._prepared: set[int] = set()

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Finds out which layer this is; a layer that is not compressed is given to vLLM's own attention."""
        layers = self._config.compilation_config.static_forward_context
        name, layer = next((name, layer) for name, layer in layers.items() if getattr(layer, "impl", None) is self)
        index: Any = extract_layer_index(name)
        self.layer_index, self._memory = index, None
        windows = [other.sliding_window for other in layers.values() if isinstance(other, Attention)]
        mixed = None in windows and any(window is not None for window in windows)
        count = self._config.model_config.hf_text_config.num_hidden_layers
        if self.options.compressed(index, count, beside_full=mixed and self.sliding_window is not None):
            skipping = mixed and self.options.skip_sliding_window
            layer.attn_backend = for_options(self.options, beside_windows=skipping)
            self.statistics, self.statistics_from = self._key_statistics(index)
            return
        layer.attn_backend, layer.impl = self._full_precision()
        layer.backend = AttentionBackendEnum[layer.attn_backend.get_name()]
        layer.impl.process_weights_after_loading(act_dtype)

    def _key_statistics(self, layer: int) -> tuple[tuple[torch.Tensor, torch.Tensor] | None, str | None]:
        model, config = identity_of(self._config), self._config.model_config
        path = find_statistics(model, self.options.statistics)
        if path is not None:
            arrays = read_statistics(path, model)
            return layer_statistics(arrays, layer, self.num_kv_heads, self.head_size), str(path)
        found = bias_statistics(self._owner(), config.hf_text_config, positions=config.max_model_len)
        return found, None if found is None else "their bias"

    def _full_precision(self) -> tuple[Any, Any]:
        """The backend that vLLM would choose for this layer, and its implementation of the layer."""
        config = AttentionSelectorConfig(
            head_size=self.head_size,
            dtype=self._config.model_config.dtype,
            kv_cache_dtype="auto",
            block_size=None,
            has_sink=self.sinks is not None,
            has_sliding_window=self.sliding_window is not None,
        )
        unset: Any = None
        with set_current_vllm_config(self._config):
            backend = resolve_obj_by_qualname(current_platform.get_attn_backend_cls(unset, config))
            sinks = {} if self.sinks is None else {"sinks": self.sinks}
            return backend, backend.get_impl_cls()(*self._arguments, **sinks)

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """Compresses the tokens of a step into their page slots, and copies those of the window to the hot pool."""
        if kv_cache.numel() == 0:  # while vLLM measures memory
            return
        count, metadata, slots, places = slot_mapping.shape[0], _metadata_of(layer), slot_mapping, None
        if self._memory != (kv_cache.data_ptr(), kv_cache.shape):
            self._pool, self._memory = self._make_pool(kv_cache, key, value), (kv_cache.data_ptr(), kv_cache.shape)
            for call in () if metadata is None else metadata.uniform:
                self._prepare(call, key.dtype)  # they compile while the first write waits for its own kernels
        assert self._pool is not None
        if metadata is not None and metadata.count == count:
            slots, places = metadata.slots, metadata.places
        self._pool.write(key[:count], value[:count], slots, places)
        self.written += count

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: TurboQuantMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attends with the queries of a step over the pages; writes the outputs to `output`."""
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("outputs are not quantized, got output_scale")
        if attn_metadata is None:  # while vLLM measures memory
            self._reserve(self._config.cache_config.block_size, query)
            self._attend_prompts.take(query.device)
            return output.zero_()
        for call in attn_metadata.uniform:
            assert self._pool is not None
            self._prepare(call, query.dtype)
            call.attend(self._pool, query, output, self._attend_options, self._sink_logits)
            self.attended += call.run.requests * call.run.queries
        for chunks in attn_metadata.prompts:
            self._attend_prompts(self._pool, chunks, query, key, value, output, self._sink_logits)
            self.attended += chunks.starts[-1]
        return output

    def _prepare(self, call: UniformCall, dtype: torch.dtype) -> None:
        """Starts to compile the kernels of calls with as many queries, once; the first layer compiles for all."""
        if (queries := call.run.queries) in self._prepared:
            return
        assert self._pool is not None
        asked = torch.empty((1, queries, self.num_heads, self.head_size), dtype=dtype, device="meta")
        most = self._config.scheduler_config.max_num_seqs
        self._pool.prepare_attend(most, asked, call.rows, self._attend_options, self._sink_logits)
        self._prepared.add(queries)

    @property
    def prompt_attention(self) -> PromptAttention:
        """What attends with the queries of prompts."""
        return self._attend_prompts

    @functools.cached_property
    def _sink_logits(self) -> torch.Tensor | None:
        """The sink logits as kernels take them; read once weights are loaded."""
        return None if self.sinks is None else self.sinks.detach().float()

    def _reserve(self, block: int | None, like: torch.Tensor) -> None:
        """Takes the memory of the hot pool, for blocks of so many tokens, if there is a window."""
        window = window_of(self._config, block) if block else None
        if window is not None:
            most, shape = self._config.scheduler_config.max_num_seqs, (self.num_kv_heads, self.head_size)
            self._hot = reserve(self._hot, window, requests=most, shape=shape, like=like)

    def _make_pool(self, kv_cache: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> PagedPool:
        self._reserve(kv_cache.shape[2], key)
        pool = PagedPool(kv_cache, *_quantizers(self.options, self.head_size), key.dtype, self.statistics, self._hot)
        pool.prepare_writes(key, value)
        self._prepared.clear()
        return pool


def _metadata_of(layer: Any) -> TurboQuantMetadata | None:
    """The metadata of the step for a layer; None without any."""
    if layer is None or not is_forward_context_available():
        return None
    metadata = get_forward_context().attn_metadata
    found = metadata.get(layer.layer_name) if isinstance(metadata, dict) else None
    return found if isinstance(found, TurboQuantMetadata) else None


@functools.lru_cache(maxsize=8)
def _quantizers(options: Options, head_size: int) -> tuple[tq.Quantizer, tq.Quantizer]:
    """Quantizers of keys and values, shared by all layers."""
    key, value = options.quantizers(head_size)
    return tq.make_quantizer(key, seed=options.seed), tq.make_quantizer(value, seed=options.seed + 1)


def layer_statistics(
    arrays: tuple[np.ndarray, np.ndarray], layer: int, heads: int, dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and weight of a layer's keys, for the KV heads of this process.

    Args:
        arrays: Mean and weight of all layers and KV heads of the model, [layers, h_kv, d] each.
        layer: Index of the layer in the model.
        heads: KV heads of this process.
        dim: Dimension of a head.

    Returns:
        Mean and weight, float32 [heads, dim] each.

    Raises:
        ValueError: For statistics that do not fit the layer.
    """
    from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

    layers, total, found = arrays[0].shape
    if layer >= layers or found != dim or total < heads:
        raise ValueError(
            f"expected statistics of more than {layer} layers, at least {heads} heads and {dim} channels, "
            f"got {arrays[0].shape}"
        )
    start = get_tensor_model_parallel_rank() * total // get_tensor_model_parallel_world_size()
    mean, weight = (torch.from_numpy(x[layer, start : start + heads]) for x in arrays)
    return mean, weight
