"""Data sets made better with a model: pairs that agree, vectors of all samples, near duplicates."""
