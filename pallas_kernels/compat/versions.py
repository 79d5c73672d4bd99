"""Which versions of JAX behave differently, each difference by a name.

Kernels and caches ask for a behaviour, never for a version.
"""

import jax

LOWERING_NAMES_DEVICE = jax.__version_info__ >= (0, 11)
"""Whether lowering for a GPU that is absent needs an abstract device; before, the lowering assumes Hopper."""
