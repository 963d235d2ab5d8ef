"""Tests of `hf_usp.utils`."""
