"""Samples in their order, read ahead by worker processes, as batches."""
