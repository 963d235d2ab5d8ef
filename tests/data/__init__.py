"""Tests of `hf_usp.data`."""
