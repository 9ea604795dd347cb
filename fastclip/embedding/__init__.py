"""Vectors: of whole data sets, computed so that a stop loses nothing, and of queries that add and subtract terms."""
