"""Restores steps: chooses one, matches it with `like`, shares the reading among processes, falls back from damage."""
