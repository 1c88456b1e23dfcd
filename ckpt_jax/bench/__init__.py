"""`ckpt-jax bench`: measurements side by side with raw Orbax."""
