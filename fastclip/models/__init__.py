"""Image and text towers, and the tokenizer in front of them."""
