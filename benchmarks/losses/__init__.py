"""The losses beside their peers."""
