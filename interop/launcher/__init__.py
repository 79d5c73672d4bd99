"""Pallas kernels run by torch: lowered by JAX, compiled by `triton`, launched on torch's stream, captured as graphs."""
