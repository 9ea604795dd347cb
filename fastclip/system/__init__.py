"""Files, locks, processes, the machine, the environment and lazy imports, on which the other packages are built."""
