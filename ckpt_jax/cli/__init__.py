"""The `ckpt-jax` command: one file a command, thin; `app` puts them together."""

from ckpt_jax.cli.app import main

__all__ = ["main"]
