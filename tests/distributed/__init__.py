"""Tests of `hf_usp.distributed`."""
