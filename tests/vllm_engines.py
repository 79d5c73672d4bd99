"""A tiny random model with a tokenizer, vLLM engines over it, and the answers of our own torch cache."""

import contextlib
import dataclasses
import itertools
import json
from pathlib import Path

import jax.numpy as jnp

import tq_jax as tq

VOCABULARY, NEW = 199, 24
PROMPTS = (60, 33, 1, 40)
"""Tokens of each prompt: several blocks of 32 and a part, just over one block, one token, just over one block."""

PRECISE, SAME = {"key_bits": 8, "value_bits": 8}, 16
"""Options with which tokens read from their codes give the same text as tokens read as they were, and for how long: one
of the texts goes on with two tokens that are equally likely."""


def make_model(folder, layers, kind="Llama", bias=0.0):
    """Saves a random model whose next tokens depend on the whole context, and a tokenizer of words w0, w1, ...

    `bias` is the size of the key bias (Qwen2) in the channels that rotate slowest.
    """
    import torch
    import transformers

    torch.manual_seed(0)
    given = {"head_dim": 32, "hidden_size": 64} if kind == "Llama" else {"hidden_size": 128}
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=VOCABULARY, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.08,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, **given,
    )  # fmt: skip
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(4)
        if bias:
            for layer in model.model.layers:
                layer.self_attn.k_proj.bias.view(2, 2, 16)[..., 10:] = bias * torch.tensor([1.0, -1.0])[:, None, None]
    return save_model(folder, model)


def save_model(folder, model):
    """Saves a model, and a tokenizer of words w0, w1, ..."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w1", eos_token="w2")
    tokenizer.chat_template = "{% for m in messages %}w3 {{ m['content'] }} {% endfor %}w4"
    tokenizer.save_pretrained(folder)
    return str(folder)


def make_eagle(target, folder):
    """Saves an EAGLE head with small random weights for a model of `make_model`: it drafts repetitions."""
    import torch
    from safetensors.torch import save_file

    config = json.loads((Path(target) / "config.json").read_text())
    size, inner, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    query, kv = (dim * config[f"num_{name}_heads"] for name in ("attention", "key_value"))
    shapes = {
        "self_attn.q_proj": (query, size), "self_attn.k_proj": (kv, size), "self_attn.v_proj": (kv, size),
        "self_attn.o_proj": (size, query), "mlp.gate_proj": (inner, size), "mlp.up_proj": (inner, size),
        "mlp.down_proj": (size, inner), "fc": (size, size),
    }  # fmt: skip
    draw = torch.Generator().manual_seed(3)
    weights = {name: 0.02 * torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    weights["fc"] = torch.cat([weights["fc"], torch.eye(size)], 1)  # of the token's embedding and the last hidden state
    weights["post_attention_layernorm"] = torch.ones(size)
    named = {f"{'' if name == 'fc' else 'layers.0.'}{name}.weight": array for name, array in weights.items()}
    Path(folder).mkdir()
    save_file(named, Path(folder) / "model.safetensors")
    config |= {"architectures": ["EagleLlamaForCausalLM"], "num_hidden_layers": 1}
    (Path(folder) / "config.json").write_text(json.dumps(config))
    return str(folder)


@contextlib.contextmanager
def running(folder, options, **arguments):
    """An engine in this process with our backend, without a window unless options say so.

    If options are None, with vLLM's own attention.
    """
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    given = dict(dtype="float32", max_model_len=256, block_size=32, enforce_eager=True, kv_cache_memory_bytes=1 << 22)
    if options is not None:
        given |= dict(attention_backend="CUSTOM", additional_config={"tq_jax": {"window": 0, "sinks": 0} | options})
    engine = LLM(model=folder, seed=0, **(given | arguments))
    try:
        yield engine
    finally:
        engine.llm_engine.engine_core.shutdown()  # now, and not when the last name of it goes
        cleanup_dist_env_and_memory()


def answers(engine, prompts, **options):
    """Tokens of a batch, greedy unless options say otherwise, and the tokens of each prompt from the prefix cache."""
    from vllm import SamplingParams

    sampling = SamplingParams(**(dict(temperature=0, max_tokens=NEW, ignore_eos=True) | options))
    found = engine.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
    return [[list(x.token_ids) for x in one.outputs] for one in found], [one.num_cached_tokens for one in found]


def greedy(engine, prompts):
    return [one[0] for one in answers(engine, prompts)[0]]


def clear(engine, prompts, gap):
    """Greedy tokens, up to the first whose log-probability is not by a gap above that of the next likely one."""
    from vllm import SamplingParams

    asked = [{"prompt_token_ids": ids} for ids in prompts]
    outputs = engine.generate(asked, SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, logprobs=2))
    texts = []
    for output in outputs:
        [one] = output.outputs
        gaps = []
        for step in one.logprobs:
            likeliest, next_one, *_ = sorted((x.logprob for x in step.values()), reverse=True)
            gaps.append(likeliest - next_one)
        count = len(list(itertools.takewhile(lambda found: found > gap, gaps)))
        texts.append(list(one.token_ids[:count]))
    return texts


def layers_of(engine):
    """Of each layer: class, tokens written, queries attended with, shape of its memory."""

    def look(worker):
        layers = worker.vllm_config.compilation_config.static_forward_context
        return [
            (
                type(x.impl).__name__,
                getattr(x.impl, "written", None),
                getattr(x.impl, "attended", None),
                tuple(x.kv_cache.shape),
            )
            for x in layers.values()
            if hasattr(x, "impl")
        ]

    return engine.collective_rpc(look)[0]


def cold_reads(engine):
    """Tokens of windows that were read from codes, as the builders of metadata say."""

    def look(worker):
        groups = [group for groups in worker.model_runner.attn_groups for group in groups]
        return sum(group.get_metadata_builder().cold_reads() for group in groups)

    return engine.collective_rpc(look)[0]


def drafted(folder, prompts, options, **drafts):
    """Greedy tokens, how often drafts of each place were accepted, and the classes of the layers, the model's first."""
    drafts = {"num_speculative_tokens": 3} | drafts
    with running(folder, options, speculative_config=drafts, disable_log_stats=False) as engine:
        tokens = [one[0] for one in answers(engine, prompts, max_tokens=SAME)[0]]
        counts = {x.name: getattr(x, "values", getattr(x, "value", None)) for x in engine.get_metrics()}
        names = ("drafts", "draft_tokens", "accepted_tokens", "accepted_tokens_per_pos")
        layers = [name for name, *_ in layers_of(engine)]
    return tokens, {name: counts[f"vllm:spec_decode_num_{name}"] for name in names}, layers


def own_answers(folder, prompts, *, exact_layers=(), statistics=None, **options):
    """Greedy tokens of transformers with our torch cache without a window; prompts attend to themselves exactly."""
    import torch
    import transformers
    from transformers.cache_utils import DynamicLayer

    from interop.hf import ATTENTION, CACHE_ARGUMENT, TurboQuantCache
    from interop.torch.cache import TorchCache

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.set_attn_implementation(ATTENTION)
    model.generation_config.eos_token_id = None
    found = []
    for ids in prompts:
        cache = TurboQuantCache(
            model.config, window=0, sink_tokens=0, center_keys=False, smooth_keys=False,
            page_size=32, dtype="float32", max_tokens=256, **options,
        )  # fmt: skip
        for index, layer in enumerate(cache.layers if statistics else ()):
            spec = dataclasses.replace(layer.compression.spec(2, 32, 0), center_keys=True, smooth_keys=True)
            given = tuple(jnp.asarray(array[index]) for array in tq.load_statistics(statistics))
            layer.cache = TorchCache(spec, 1, seed=layer.compression.seed, statistics=given)
        for layer in exact_layers:
            cache.layers[layer] = DynamicLayer()
        given = {CACHE_ARGUMENT: cache} | dict(
            attention_mask=torch.ones(1, len(ids), dtype=torch.long), max_new_tokens=NEW, do_sample=False
        )
        out = model.generate(torch.tensor([ids]), pad_token_id=0, **given)
        found.append(out[0, len(ids) :].tolist())
    return found
