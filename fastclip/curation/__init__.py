"""Improve datasets with a model: keep the pairs that agree, embed all samples, drop near duplicates."""
