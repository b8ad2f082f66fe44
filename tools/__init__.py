"""Programs that people run before and after a run: `python -m tools.NAME --help`."""
