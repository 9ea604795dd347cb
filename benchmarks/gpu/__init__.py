"""Parts of the measurements on a GPU, which gpu_check.py and gpu_ten.py run."""
