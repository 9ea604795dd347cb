"""Names and captions of classes."""
