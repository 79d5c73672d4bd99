"""One of two hosts that generate together, with two devices each; run by test_several_hosts."""

import sys

import jax

sys.path.insert(0, sys.argv[3])
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.distributed.initialize(f"localhost:{sys.argv[2]}", num_processes=2, process_id=int(sys.argv[1]))

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from flax import nnx  # noqa: E402

import tq_jax as tq  # noqa: E402
from tq_jax.models import Decoder, DecoderConfig, generate, pad_prompts, shard  # noqa: E402

decoder = Decoder(
    DecoderConfig(vocab_size=300, dim=48, num_layers=2, num_heads=8, num_kv_heads=4, head_dim=16, ffn_dim=80),
    rngs=nnx.Rngs(0),
)
spec = tq.CacheSpec.recommended(
    4, 16, max_tokens=96, key_bits=8, value_bits=8, window=8, page_size=16, dtype="float32"
)  # fmt: skip
ids = np.random.default_rng(1).integers(0, 300, 61).tolist()
tokens, lengths = pad_prompts([ids[:23], ids[:1], ids])
turn, one = jnp.asarray([[1, 2], [3, 4], [5, 6]], jnp.int32), jnp.asarray([2, 1, 2], jnp.int32)

assert jax.process_count() == 2 and len(jax.devices()) == 4
# The tokens of a sequence lie on both hosts, KV heads on the two devices of each.
mesh = jax.make_mesh((2, 2), ("sequence", "heads"))
spread, found = shard(decoder, mesh), []
for network, where in ((decoder, None), (spread, mesh)):
    first = generate(network, tokens, lengths, cache_spec=spec, max_new_tokens=6, mesh=where)
    second = generate(network, turn, one, cache=first.cache, max_new_tokens=6, mesh=where)
    found.append((first.sequences(), second.sequences()))
assert found[0] == found[1], found
print("equal")
