"""Differences between versions of JAX, by name: kernels and caches ask for a behaviour, never for a version."""

import jax

LOWERING_NAMES_DEVICE = jax.__version_info__ >= (0, 11)
"""Whether lowering for an absent GPU needs an abstract device; earlier versions assume Hopper."""
