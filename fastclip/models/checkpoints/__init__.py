"""Read and write model files, and translate them between the formats of open_clip, Hugging Face and fastclip."""
