"""HTML report of a run: its options, its metrics, and what its model gets right and wrong."""
