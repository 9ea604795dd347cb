"""Files, locks, processes and the machine: what every part stands on, and nothing of the field."""
