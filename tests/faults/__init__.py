"""Faults on purpose, at every place of a run; `python -m tests.faults` prints the table of docs/faults.md."""
