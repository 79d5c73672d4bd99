"""Attention over packed TurboQuant caches: arrays in, arrays out.

This package knows arrays and byte layouts and nothing above them; `tq_jax` holds the algorithm and the cache, `interop`
the other frameworks.
"""
