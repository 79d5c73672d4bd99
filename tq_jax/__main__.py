"""`python -m tq_jax`: the command line."""

from tq_jax.commands.cli import main

if __name__ == "__main__":
    main("python -m tq_jax")
