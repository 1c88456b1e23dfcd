"""The version of the package; apart, so that packaging can read it without importing jax."""

__version__ = "0.1.0"
