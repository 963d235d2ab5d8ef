"""Transformers models: their traits, hooks, attention and mask functions, checks."""
