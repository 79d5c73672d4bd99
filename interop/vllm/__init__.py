"""A vLLM attention backend over compressed pages, for vLLM 0.29 and later on CPUs and NVIDIA GPUs.

Installed beside vLLM it registers itself; nothing changes until it is chosen:

    vllm serve MODEL --attention-backend CUSTOM --additional-config '{"tq_jax": {"key_bits": 4, "value_bits": 4}}'

`interop.vllm.options.Options` lists the options; unknown ones are refused. At the start it says which layers are
compressed, how, and what that saves.

What is stored. vLLM's memory of a layer holds the pages of `pallas_kernels.pages.Pages` (key codes by token, value
codes by channel, scales), block b of vLLM being page b; a token takes exactly the bytes of its codes and scales, and
vLLM makes as many blocks as fit. The pools of a layer lie one behind the other, so a block is not one run of bytes:
features that move blocks as bytes (KV connectors and offloading, models with state-space layers) are refused.

What is computed. A token is compressed when it is written, and attention reads every token from its codes, those of
its own chunk too. So chunked prefill, prefix-cache hits and preemption do not change what a request is answered. The
price is that there is no window of recent tokens in full precision and no centring by the statistics of a prompt:
`boundary_layers` keeps the first and last layers in full precision, in vLLM's own attention, and `statistics` names a
file of means and channel weights of a model (see `interop.hf.calibrate`). Without one, keys that have a bias (Qwen2)
are centred by what the model's weights say (see `interop.vllm.bias_statistics`), and others are stored as they are.

Where. On a CPU JAX computes and torch writes, for which the plugin replaces vLLM's CPU platform by one that honours
`--attention-backend CUSTOM` (the stock one ignores it). On an NVIDIA GPU torch launches the Pallas kernels: decodes
take that for few queries, chunks of a prompt that for many. vLLM's CUDA graphs leave attention out.

Supported: grouped queries, sliding windows, soft-caps, learned sinks, sampling n, beams, tensor parallelism.
Refused: MLA, alibi, encoders and cross-attention, layers that share keys and values, non-causal attention, KV-cache
types other than "auto", context parallelism, fused output quantization.
"""
