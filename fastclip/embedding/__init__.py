"""Embed whole datasets, with resumption after interruptions, and combine texts and images into queries."""
