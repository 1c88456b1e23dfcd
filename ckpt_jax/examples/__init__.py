"""The main job of `make run`."""
