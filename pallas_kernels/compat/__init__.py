"""What this package asks of private parts of JAX and of the `triton` package, and what it knows of devices.

Every switch between versions of JAX and every private import is in one of these modules.
"""
