"""Bytes and seconds for people."""

from __future__ import annotations


def size_text(nbytes: float) -> str:
  """`1.5 GiB`: three digits or so, in powers of 1024."""
  for unit in ("B", "KiB", "MiB", "GiB"):
    if abs(nbytes) < 1024:
      return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
    nbytes /= 1024
  return f"{nbytes:.1f} TiB"


def duration_text(seconds: float) -> str:
  """`1.5 h`: three digits, in the largest unit of which there are two or more."""
  if seconds < 1:
    return f"{seconds * 1e3:.3g} ms"
  for unit, length in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
    if seconds >= 2 * length:
      return f"{seconds / length:.3g} {unit}"
  return f"{seconds:.3g} s"
