"""Random modules, settings and failures: a run with monitors is the run without; ``python -m fuzz`` from ``tests``."""
