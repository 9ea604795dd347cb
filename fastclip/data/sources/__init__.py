"""Kinds of data: each class reads pictures and captions by number (`fastclip.data.source.Source`)."""
