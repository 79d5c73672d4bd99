"""The loop of decoding steps of a Llama 3.1 8B shape, as XLA compiles it for an H100: what it copies and launches."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import tq_jax as tq
from pallas_kernels.compat.lowering import lower_for_cuda
from tq_jax.models import Decoder, DecoderConfig
from tq_jax.models.generate import decode_loop
from tq_jax.models.sampling import Sampling

BATCH, CONTEXT, STEPS = 8, 4096, 32

LAYERS = (2, 4)
"""Numbers of layers that are compiled: the difference is what a layer adds."""

LAUNCHES = 12
"""Launches per layer: four products and two sums of split ones, two norms, one of the activation, and three of
attention, the first of which splits the heads. The cache is written once per step for all layers."""

LARGE = 2**15
"""Bytes from which on an array counts as a weight or a part of the cache."""

MOVES = ("copy", "copy-start", "slice", "dynamic-slice", "fusion", "transpose", "concatenate")
"""Operations in HLO that make a new array out of the elements of another one."""

TYPES = {"uint8": "u8", "uint16": "u16", "float16": "f16", "float32": "f32", "bfloat16": "bf16", "int32": "s32"}


def row(sharding: Any) -> dict[str, Any]:
    """The row of the loop for the table of `tq-jax gate --xla`.

    Args:
        sharding: Places arrays on the absent device.
    """
    compiled = [_compile(layers, sharding) for layers in LAYERS]
    counts = [launches(text) for text, _ in compiled]
    per_layer = (counts[1] - counts[0]) / (LAYERS[1] - LAYERS[0])
    copies = [found for text, arrays in compiled for found in moved(text, arrays)]
    return {
        "kernel": "xla: decode loop of an 8B shape",
        "config": f"{per_layer:g} launches per layer, at most {LAUNCHES}",
        "launches_per_layer": per_layer,
        "missing": [] if per_layer <= LAUNCHES else [f"more than {LAUNCHES} launches per layer"],
        "copies": copies,
        "ok": not copies and per_layer <= LAUNCHES,
    }


def _compile(layers: int, sharding: Any, *, unroll: bool = True) -> tuple[str, list[Any]]:
    """Optimized HLO of the loop, and the shapes of weights and cache."""
    config = DecoderConfig(
        vocab_size=128256, dim=4096, num_layers=layers, num_heads=32, num_kv_heads=8, head_dim=128, ffn_dim=14336
    )  # fmt: skip
    decoder = nnx.eval_shape(lambda: Decoder(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0), unroll=unroll))
    spec = tq.CacheSpec.recommended(num_kv_heads=8, head_dim=128, max_tokens=CONTEXT)
    cache = jax.eval_shape(lambda: tq.init_cache(spec, batch=layers * BATCH))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), BATCH))
    integers = jax.ShapeDtypeStruct((BATCH,), jnp.int32)
    arguments = decoder, integers, cache, keys, jax.ShapeDtypeStruct((0,), jnp.int32)
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments)

    def loop(decoder: Any, first: Any, cache: Any, keys: Any, stop: Any) -> Any:
        options = {"sampling": Sampling(), "max_new_tokens": STEPS, "implementation": "auto"}
        return decode_loop(decoder, first, cache, keys, stop, **options)

    text = lower_for_cuda(loop, *placed, donated=(2,)).compile().as_text()
    return text, jax.tree.leaves((nnx.state(decoder), cache))


def launches(hlo: str) -> int:
    r"""Kernels that one pass through the largest loop of optimized HLO launches.

    Example:
        >>> launches("%body (p: f32[2]) -> f32[2] {\n %a = f32[2] fusion(%p), kind=kLoop\n}\n"
        ...          "ENTRY %e (x: f32[2]) -> f32[2] {\n %w = f32[2] while(%x), body=%body\n}")
        1
    """
    launched = r"= [^=\n]*? (?:fusion|custom-call|copy|dot|iota|broadcast|reduce|concatenate)\("
    bodies = set(re.findall(r"body=%([\w.-]+)", hlo))
    counts = [0]
    for name, body in re.findall(r"^(?:ENTRY )?%([\w.-]+) [^\n]*\{\n(.*?)^\}", hlo, flags=re.MULTILINE | re.DOTALL):
        if name in bodies:
            counts.append(len(re.findall(launched, body)))
    return max(counts)


def moved(hlo: str, arrays: list[Any]) -> list[str]:
    """Types of the results of MOVES in optimized HLO that are types of large arrays.

    Example:
        >>> moved("%slice.1 = bf16[4096,4096]{1,0} slice(%p)", [jax.ShapeDtypeStruct((4096, 4096), "bfloat16")])
        ['slice bf16[4096,4096]']
    """
    types = set()
    for x in (x for x in arrays if str(x.dtype) in TYPES and x.size * x.dtype.itemsize >= LARGE):
        # Parameters have an axis of layers in front, and products take matrices [outputs, inputs].
        layer = x.shape[1:]
        for shape in (x.shape, layer, (1, *layer), (math.prod(layer[:-1]), x.shape[-1])):
            types.add(f"{TYPES[str(x.dtype)]}[{','.join(map(str, shape))}]")
    found = re.findall(rf"= \(?(\w+\[[\d,]*\])[^=\n]*? ({'|'.join(MOVES)})\(", hlo)
    return [f"{operation} {kind}" for kind, operation in found if kind in types]
