"""Tests of `hf_usp.attention`, against the dense oracle."""
