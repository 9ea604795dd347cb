"""Find, copy, index and read tar shards of images and captions."""
