"""Layers with a state along the sequence, sharded."""
