"""A committed step in another form: replaced by a crash-safe swap, copied, repacked, thinned."""
