"""The nearest neighbours of a vector, from codes of a few bits.

    python examples/nearest_neighbours.py king Monday river        words of the model SmolLM2-135M, a download of 93 MB
    python examples/nearest_neighbours.py --vectors FILE.npy 0 17   rows of an array [n, dim] of yours

The index holds the codes alone; true neighbours, from the vectors themselves, stand beside the found ones.
"""

import argparse
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from tq_jax import search


def embeddings() -> tuple[np.ndarray, Callable[[str], int], Callable[[int], str]]:
    """Token embeddings of SmolLM2, the token of a word, and the word of a token."""
    from tq_jax.models import load_model

    model = load_model()

    def token(word: str) -> int:
        return only_token(word, model.tokenizer.encode(f" {word}"))

    vectors = np.asarray(model.decoder.embedding.embedding[...], np.float32)
    return vectors, token, lambda number: model.tokenizer.decode([number]).strip()


def only_token(word: str, tokens: list[int]) -> int:
    """The token of a word; a word of several tokens has no embedding of its own."""
    if len(tokens) != 1:
        raise SystemExit(f"expected a word that is one token of the model, got {word!r} of {len(tokens)} tokens")
    return tokens[0]


def main() -> None:
    """Builds the index and looks up each query."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("queries", nargs="+", help="words, or numbers of rows with --vectors")
    parser.add_argument("--vectors", help="a .npy file of vectors [n, dim]")
    parser.add_argument("--bits", type=int, default=4, help="bits per number")
    parser.add_argument("--neighbours", type=int, default=6)
    options = parser.parse_args()

    vectors, number, name = (np.load(options.vectors), int, str) if options.vectors else embeddings()
    spec = search.IndexSpec(dim=vectors.shape[1], bits=options.bits, metric="cosine")
    index = search.build(jnp.asarray(vectors, jnp.float32), spec)
    chosen = jnp.asarray(vectors[[number(query) for query in options.queries]], jnp.float32)
    scores, ids = search.search(index, chosen, k=options.neighbours)

    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    exact = jax.lax.top_k(jnp.asarray(unit[[number(query) for query in options.queries]] @ unit.T), options.neighbours)
    print(f"{len(vectors):,} vectors of {vectors.shape[1]} numbers, {index.bytes_per_vector} bytes each")
    for query, found, score, true in zip(options.queries, ids, scores, exact[1], strict=True):
        print(f"\n{query}")
        print("  found:", ", ".join(f"{name(int(i))} {s:.2f}" for i, s in zip(found, score, strict=True)))
        print("  true: ", ", ".join(name(int(i)) for i in true))


if __name__ == "__main__":
    main()
