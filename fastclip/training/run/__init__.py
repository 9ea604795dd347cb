"""A run from its last checkpoint to its end: the loop, checkpoints, metrics, skipped samples."""
