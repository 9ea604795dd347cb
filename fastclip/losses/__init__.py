"""The public losses: they check arguments, match labels, and compute the loss from the statistics of the ops."""
