"""The losses on several processes: counted, timed and modelled."""
