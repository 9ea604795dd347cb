"""Parts of what is measured on a GPU, which gpu_check.py and gpu_ten.py run."""
