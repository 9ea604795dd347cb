"""Tokenizers of CLIP and BERT."""
