"""Files, locks, processes, the machine, the environment and lazy imports: nothing of the field, all stands on it."""
