"""From training to serving: checkpoints of other programs, exports."""
