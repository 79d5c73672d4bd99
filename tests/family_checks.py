"""What a tiny random model of a family does with a compressed cache, beside what it does with DynamicCache."""

import dataclasses
import warnings

import torch
import transformers
from fake_quant_hf import given
from text_families import BASE, DENSE_FAMILIES, TEXT_FAMILIES
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, DynamicCache
from vision_families import FAMILIES
from vision_inputs import SEEDED, prompt

from interop.hf import ATTENTION, TurboQuantCache
from interop.hf.layer import VERSION

WINDOW = 256
"""Tokens in full precision; no prompt here is longer."""

MOST = 1e-4
"""Largest difference of logits inside the window."""

MOST_KL = 2e-3
"""Largest mean KL divergence at 8 bits, in nats: a router of experts may turn, which costs up to 1e-3."""

GREEDY = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
SCORES = dict(return_dict_in_generate=True, output_logits=True)
EXACT = dict(window=WINDOW, dtype="float32")
EIGHT = dict(key_bits=8, value_bits=8, window=0, sink_tokens=0, dtype="float32")


@dataclasses.dataclass(frozen=True)
class Found:
    """What was found of a model.

    Attributes:
        model: Name of its class.
        compressed: Number of compressed layers.
        layers: Number of layers.
        same_tokens: Whether greedy tokens are those of DynamicCache while all tokens lie in the window.
        difference: Largest difference of the logits of these tokens.
        kl: Mean KL divergence of later tokens at 8 bits without a window or sinks, in nats.
    """

    model: str
    compressed: int
    layers: int
    same_tokens: bool
    difference: float
    kl: float

    @property
    def is_exact(self) -> bool:
        return self.same_tokens and self.difference <= MOST


def is_known(model_type):
    """Whether this release of transformers has the family."""
    return model_type in transformers.CONFIG_MAPPING


def make_text(name):
    torch.manual_seed(0)
    options = BASE | (TEXT_FAMILIES | DENSE_FAMILIES)[name]
    config = AutoConfig.for_model(name, **{key: value for key, value in options.items() if value is not Ellipsis})
    return AutoModelForCausalLM.from_config(config).eval()


def ask_text(seed=0):
    """Two rows, one of which is padded."""
    ids = torch.randint(3, 199, (2, 60), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    return dict(input_ids=ids, attention_mask=mask)


def for_release(config):
    """A configuration in the words of this release: transformers 4 has other names for the rotary embedding."""
    if VERSION >= (5, 0):
        return config
    config = {key: for_release(value) if isinstance(value, dict) else value for key, value in config.items()}
    rope = dict(config.pop("rope_parameters", {}))
    if rope:
        config |= dict(rope_theta=rope.pop("rope_theta"), rope_scaling=rope)
    return config


def make_vision(name):
    torch.manual_seed(0)
    config = AutoConfig.for_model(**for_release(FAMILIES[name].config))
    model = AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():  # gates and projections that would hide the image
                parameter.normal_(0, 0.1)
    return model


def ask_vision(name, kind, seed=0):
    """Arguments of `generate` with an image or video of this seed."""
    SEEDED.manual_seed(seed)
    family = FAMILIES[name]
    asked = prompt(family, getattr(family, kind)(), kind)
    if VERSION < (5, 0):
        asked.pop("mm_token_type_ids", None)
    return asked


def run(model, attention, cache, **asked):
    """Tokens, and logits of each of them."""
    if attention != model.config._attn_implementation:
        model.set_attn_implementation(attention)
    out = model.generate(**asked, **given(cache), **GREEDY, **SCORES)
    return out.sequences, torch.stack(out.logits)


def compress(model, **options):
    """A compressed cache; which layers it leaves alone is no matter here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return TurboQuantCache(model.config, **options)


def check(model, asked, *, dense=False):
    """Runs a model with DynamicCache in its own attention, and with compressed caches."""
    own = model.config._attn_implementation
    attention = own if dense else ATTENTION
    tokens, logits = run(model, own, DynamicCache(config=model.config), **asked)
    cache = compress(model, dense=dense, **EXACT)
    found, ours = run(model, attention, cache, **asked)
    codes, eight = run(model, attention, compress(model, dense=dense, **EIGHT), **asked)
    chosen, kept = cache.compressed_layers, cache.kept_layers
    return Found(
        type(model).__name__, len(chosen), len(chosen) + len(kept), torch.equal(found, tokens),
        float((ours - logits).abs().max()), divergence(tokens, logits, codes, eight),
    )  # fmt: skip


def divergence(tokens, logits, found, ours):
    """Mean KL divergence of the tokens behind the first, of each row as long as its tokens are the same, in nats."""
    steps, rows, _ = logits.shape
    same = (tokens[:, -steps:] == found[:, -steps:]).T.cummin(0).values
    alike = torch.cat([torch.ones(1, rows, dtype=torch.bool), same[:-1]])[1:]
    ours, logits = (x[1:].double().log_softmax(-1) for x in (ours, logits))
    kl = torch.where(logits == -torch.inf, 0, logits.exp() * (logits - ours)).sum(-1)
    return float(kl[alike].mean())
