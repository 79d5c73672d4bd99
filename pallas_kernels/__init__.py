"""Pallas kernels over packed TurboQuant caches: arrays in, arrays out.

This package knows arrays and byte layouts and nothing above them; `tq_jax` holds the algorithm and the cache, `interop`
the other frameworks.

    format packing pages lookup     the bytes, their layout, and their reading in plain jnp
    numerics dispatch               constants of the arithmetic; the choice of an implementation
    tiles/                          from packed bytes to tiles inside a kernel
    attention/ append/ encode/      the operations
    compat/                         private parts of JAX, devices, compilation
"""

from pallas_kernels.compat import patches as patches  # every kernel may address pools of more than 2**31 elements
