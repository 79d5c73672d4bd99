"""Private parts of JAX and of the `triton` package, and facts about devices.

Every switch between versions of JAX and every private import is in one of these modules.
"""
