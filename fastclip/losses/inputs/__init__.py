"""Inputs of the losses: checked arguments, labels, limits of negatives, and the batch of all processes."""
