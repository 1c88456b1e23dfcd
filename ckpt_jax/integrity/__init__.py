"""Bits only: what was saved is what is restored. Sums, fingerprints, health, the record, verification."""
