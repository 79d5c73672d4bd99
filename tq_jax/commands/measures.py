"""Random vectors, and measurements that `tq-jax validate` and `tq-jax audit` share."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

import tq_jax as tq

_quantize = jax.jit(tq.quantize)
_dequantize = jax.jit(tq.dequantize)


def sphere(seed: int, count: int, dim: int) -> Float[Array, "count dim"]:
    """Uniformly random unit vectors, float32.

    Args:
        seed: Seed of the random stream.
        count: Number of vectors.
        dim: Dimensions of each.
    """
    return unit(jax.random.normal(jax.random.key(seed), (count, dim)))


def unit(x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
    """The vectors divided by their norms."""
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def correlated(x: Float[Array, "n dim"], cosine: float, *, seed: int) -> Float[Array, "n dim"]:
    """Unit vectors in random directions, at an exact cosine to given unit vectors.

    Args:
        x: Unit vectors.
        cosine: Inner product of each result with its vector.
        seed: Seed of the random directions.

    Example:
        >>> x = sphere(0, 2, 64)
        >>> [round(float(c), 4) for c in jnp.sum(x * correlated(x, 0.4, seed=1), axis=-1)]
        [0.4, 0.4]
    """
    noise = jax.random.normal(jax.random.key(seed), x.shape)
    noise = unit(noise - jnp.sum(noise * x, axis=-1, keepdims=True) * x)
    return cosine * x + (1 - cosine**2) ** 0.5 * noise


def restore(spec: tq.QuantizerSpec, x: Float[Array, "*batch dim"], *, seed: int = 0) -> Float[Array, "*batch dim"]:
    """Quantizes vectors and dequantizes them again.

    Args:
        spec: The quantizer.
        x: Vectors.
        seed: Seed of the quantizer.
    """
    q = tq.make_quantizer(spec, seed=seed)
    return _dequantize(q, _quantize(q, x))


def distortion(spec: tq.QuantizerSpec, x: Float[Array, "n dim"], *, seed: int = 0) -> float:
    """Mean squared error relative to the mean squared norm; D_mse for unit vectors (arXiv 2504.19874, section 3).

    Args:
        spec: The quantizer.
        x: Vectors.
        seed: Seed of the quantizer.
    """
    error = x - restore(spec, x, seed=seed)
    return float(jnp.mean(jnp.sum(error * error, axis=-1)) / jnp.mean(jnp.sum(x * x, axis=-1)))


def scores(query: Float[Array, "q dim"], key: Float[Array, "n dim"]) -> Float[Array, "q n"]:
    """All inner products, computed in full float32 precision on every device."""
    return jnp.einsum("qd,nd->qn", query, key, precision="highest")


def recall(exact: Float[Array, "q n"], estimated: Float[Array, "q n"], k: int) -> float:
    """Share of the k largest exact scores that are among the k largest estimated scores.

    Args:
        exact: True scores, one row per query.
        estimated: Scores from codes.
        k: Number of largest scores.

    Example:
        >>> recall(jnp.array([[3.0, 2.0, 1.0]]), jnp.array([[3.0, 1.0, 2.0]]), 2)
        0.5
    """
    _, best = jax.lax.top_k(exact, k)
    _, found = jax.lax.top_k(estimated, k)
    return float(jnp.mean(jnp.any(best[:, :, None] == found[:, None, :], axis=-1).astype(jnp.float32)))


def keys_with_outliers(
    seed: int, count: int, dim: int, *, mean_norm: float
) -> tuple[Float[Array, "1 dim"], Float[Array, "1 dim"], Float[Array, "count dim"]]:
    """Keys like those of models whose key projection has a bias: unequal channels around a large shared mean.

    Channel deviations are log-normal with four channels six times larger; the mean lies mostly in eight channels.

    Args:
        seed: Seed of the random stream.
        count: Number of keys.
        dim: Channels of each.
        mean_norm: Norm of the shared mean; trained models have 0 to over 1000.

    Returns:
        The mean, the standard deviation of each channel, and the deviation of each key from the mean in units of the
        standard deviation: keys are mean + std * deviation.
    """
    channels, direction, draws = jax.random.split(jax.random.key(seed), 3)
    std = jnp.exp(0.6 * jax.random.normal(channels, (1, dim))).at[:, :4].multiply(6.0)
    mean = unit(jax.random.normal(direction, (1, dim)) * jnp.where(jnp.arange(dim)[None] < 8, 10.0, 1.0))
    return mean_norm * mean, std, jax.random.normal(draws, (count, dim))


def attention_divergence(exact: Float[Array, "q n"], estimated: Float[Array, "q n"]) -> float:
    """Mean KL divergence, in nats, of the softmax of estimated scores from the softmax of exact scores.

    Example:
        >>> attention_divergence(jnp.zeros((1, 4)), jnp.ones((1, 4)))
        0.0
    """
    p, q = jax.nn.log_softmax(exact), jax.nn.log_softmax(estimated)
    return float(jnp.mean(jnp.sum(jnp.exp(p) * (p - q), axis=-1)))


def mean_cosine(x: Float[Array, "n dim"], y: Float[Array, "n dim"]) -> float:
    """Mean cosine of pairs of vectors."""
    return float(jnp.mean(jnp.sum(unit(x) * unit(y), axis=-1)))


def found(estimated: Float[Array, "q n"]) -> float:
    """Share of needles that are found: rows i whose largest score is in column i.

    Example:
        >>> found(jnp.array([[2.0, 1.0], [2.0, 1.0]]))
        0.5
    """
    return float(jnp.mean((jnp.argmax(estimated, axis=1) == jnp.arange(estimated.shape[0])).astype(jnp.float32)))
