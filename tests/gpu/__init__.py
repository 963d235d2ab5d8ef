"""Kernels and training on a real GPU: `make gpu`, or `pytest -m gpu tests/gpu`. Needs torch, pytest and hf_usp.

Packages that only some cases need are named there; `test_rehearsal.py` runs on CPU what can run there.
"""
