"""Kinds of data, each a class that reads images and captions by index (`fastclip.data.source.Source`)."""
