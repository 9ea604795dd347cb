"""Search the pictures of a folder by text, by picture, or by a mixture of these."""
