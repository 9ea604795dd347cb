"""Data sets as batches of images, captions and labels."""
