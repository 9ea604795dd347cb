"""The loop of a run, its checkpoints, its metrics and its count of skipped samples."""
