"""A vLLM attention backend over compressed pages, for vLLM 0.29 and later on CPUs and NVIDIA GPUs.

If this package is installed beside vLLM, it registers itself; nothing changes until the backend is chosen:

    vllm serve MODEL --attention-backend CUSTOM --additional-config '{"tq_jax": {"key_bits": 4, "value_bits": 4}}'

`interop.vllm.options.Options` lists the options; unknown options are refused. At the start the backend logs which
layers are compressed, how, and how much memory that saves.

Storage. A block of vLLM is a page and one run of bytes, see `pallas_kernels.blocks`: key codes by token, their scales,
value codes by channel, their scales. A token takes exactly the bytes of its codes and scales, and vLLM makes as many
blocks as fit. vLLM may zero, copy, offload and send blocks, and use a block for layers of another kind at another time.
Within a block the bytes of a token are not together: a block is moved as a whole.

Layers. Layers with a sliding window stay in vLLM's own attention if the model also has layers without one (option
`skip_sliding_window`), as do the first and last `boundary_layers`. Layers that keep a state instead of keys and values
(linear attention, state-space, short convolutions) are vLLM's.

Arithmetic. A token is compressed when it is written. The latest tokens of a request (option `window`) and its first
ones (`sinks`) are kept in full precision as well, in a hot pool beside the pages, and read there; all others are read
from their codes (see `interop.vllm.window`). Prompts attend exactly within their chunk, so that the first chunk costs
and gives what it does without compression. How a prompt is cut into chunks has a small influence on the answer, and so
has a prefix hit or a preemption, after which a window may be read from codes. With `window` and `sinks` of 0 every
token is read from its codes, the newest too. Keys are not centred by the statistics of their prompt. Instead,
`tq-jax calibrate MODEL` writes a file of key means and channel weights, which the backend finds (see
`tq_jax.statistics_files`). Without such a file, keys that have a bias (Qwen2) are centred by statistics from the
model's weights (see `interop.vllm.bias_statistics`), and keys without a bias are stored as they are; a warning says so.

Devices. On a CPU JAX computes and torch writes; the stock CPU platform of vLLM ignores `--attention-backend CUSTOM`, so
the plugin replaces it by a platform that honours it. On an NVIDIA GPU torch launches the Pallas kernels: the decode
kernel for few queries. FlashAttention attends with prompts, over dense copies of earlier tokens. CUDA
graphs hold whole steps of uniform batches, of one query per request or with drafts.

The option `boundary_layers` keeps the first and last layers in full precision, in vLLM's own attention.

Supported: grouped queries, sliding windows, soft-caps, sink logits, sampling n, beams, tensor parallelism.
Refused: MLA, ALiBi, encoders and cross-attention, layers that share keys and values, non-causal attention, KV-cache
types other than "auto", context parallelism, fused output quantization.
"""
