"""Layers with a state along the sequence, on tensors: heads exchanged, states passed, halos fetched."""
