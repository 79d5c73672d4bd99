"""`tq-jax gate`: the GPU kernels compiled without a GPU."""
