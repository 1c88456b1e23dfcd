"""What a run directory holds: steps, their metadata and names, pins, the lease, leftovers, deletion, quarantine."""
