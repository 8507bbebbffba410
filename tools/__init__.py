"""Command-line tools around the method: `python -m tools.NAME`."""
