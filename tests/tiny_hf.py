"""Small random models of Hugging Face."""

import torch
import transformers

from interop.hf import ATTENTION


def save_letters(path):
    """Saves a tokenizer of single characters, 128 of them."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({chr(code): code for code in range(128)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(path)


def tiny(kind="Llama", attention=ATTENTION, **options):
    """A model whose next tokens depend on the whole context."""
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=199, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=512, initializer_range=0.08,
        bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**(sizes | options))
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(4)
    model.set_attn_implementation(attention)
    model.generation_config.eos_token_id = None
    return model
