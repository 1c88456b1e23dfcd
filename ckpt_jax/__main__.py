"""`python -m ckpt_jax` is the `ckpt-jax` command."""

from ckpt_jax.cli.app import main

if __name__ == "__main__":
  main()
