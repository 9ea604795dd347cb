"""The losses and their peers."""
