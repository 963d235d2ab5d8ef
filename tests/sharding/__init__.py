"""Tests of `hf_usp.sharding`, against dense masks."""
