"""`python -m tq_jax`: the command line."""

from tq_jax.commands.cli import main

main()
