"""`tq-jax serve-bench`: vLLM with this package's backend beside its own, each in a process of its own."""
