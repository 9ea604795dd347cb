"""Files of models: read, written, and translated between the forms of open_clip, Hugging Face and fastclip."""
