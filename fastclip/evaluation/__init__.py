"""Evaluate trained models: zero-shot classification, retrieval, linear probes, robustness and validation."""
