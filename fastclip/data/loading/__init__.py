"""The order of samples, and the worker processes that read them ahead as batches."""
