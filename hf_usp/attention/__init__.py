"""Attention over the mesh: ulysses all-to-alls around a ring."""
