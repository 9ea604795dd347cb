"""Use a model: search pictures, filter and embed data sets."""
