"""Tar files of pictures and captions: found, copied, indexed and read."""
