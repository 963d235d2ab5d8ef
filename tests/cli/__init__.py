"""The command `hf-usp`."""
