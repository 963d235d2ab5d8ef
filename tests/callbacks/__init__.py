"""Tests of `hf_usp.callbacks`."""
