"""Tests of `hf_usp.batch`."""
