"""Faults on purpose, at every place of a run: `python -m tests.faults` runs all of them and prints the table of docs/faults.md."""
