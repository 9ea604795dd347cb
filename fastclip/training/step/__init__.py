"""One update: losses, gradient caching, optimisers."""
