"""Tests of `hf_usp.memory`."""
