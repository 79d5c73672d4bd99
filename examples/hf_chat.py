"""A Hugging Face model reads a document once and answers questions about it from one compressed cache.

    python examples/hf_chat.py MODEL_DIR document.txt "Who is ...?" "When did ...?"

MODEL_DIR is a folder or a name in the Hugging Face hub, of a model with a chat template. After each answer the cache is
cropped to the tokens that the next question shares with it, so that the document is never read again.
"""

import argparse
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from interop.hf import CACHE_ARGUMENT, TurboQuantCache


def shared(one: torch.Tensor, other: torch.Tensor) -> int:
    """How many tokens two sequences [1, tokens] have in common from their beginnings."""
    count = min(one.shape[1], other.shape[1])
    equal = (one[0, :count] == other[0, :count]).long()
    return int(equal.cumprod(0).sum())


def main() -> None:
    """Asks each question after the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a model, or its name in the Hugging Face hub")
    parser.add_argument("document", type=Path, help="a text")
    parser.add_argument("questions", nargs="+", help="what to ask about it")
    parser.add_argument("--bits", type=float, default=4, help="bits per number of keys and values")
    parser.add_argument("--new-tokens", type=int, default=64, help="most tokens of an answer")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto").to(options.device)
    model.set_attn_implementation("tq_jax")  # registered by the import of interop.hf
    cache = TurboQuantCache(model.config, key_bits=options.bits, value_bits=options.bits)
    document = options.document.read_text("utf-8")
    held = torch.zeros(1, 0, dtype=torch.long, device=options.device)  # the tokens in the cache

    for question in options.questions:
        chat = [{"role": "user", "content": f"{document}\n\n{question}"}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        inputs = inputs.to(options.device)
        kept = shared(held, inputs["input_ids"])
        if held.shape[1] > kept:
            cache.crop(kept - held.shape[1])
        started = time.perf_counter()
        output = model.generate(
            **inputs, **{CACHE_ARGUMENT: cache}, max_new_tokens=options.new_tokens, do_sample=False, pad_token_id=0
        )
        held = output[:, :-1]  # the last token was drawn and not read
        prompt = inputs["input_ids"].shape[1]
        answer = tokenizer.decode(output[0, prompt:], skip_special_tokens=True)
        print(f"\n{question}\n{answer.strip()}")
        print(f"({prompt - kept} of {prompt} tokens read, {time.perf_counter() - started:.1f} s)")
    print(f"\n{cache.summary()}; {cache.nbytes:,} bytes for {held.shape[1]} tokens")


if __name__ == "__main__":
    main()
