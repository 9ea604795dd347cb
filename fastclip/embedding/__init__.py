"""Embed whole datasets, resuming after interruptions, and queries that add and subtract texts and images."""
