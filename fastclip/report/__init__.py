"""A run as a page of HTML: what it was, how it went, what its model gets right and wrong."""
