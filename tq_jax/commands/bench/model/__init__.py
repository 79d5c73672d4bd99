"""`tq-jax bench model`: a whole decoder, from the prompt to the last token."""
