"""Embed whole datasets, so that an interruption loses nothing, and queries that add and subtract terms."""
