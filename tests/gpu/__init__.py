"""Every CUDA kernel on a real GPU: `make gpu`, or `pytest -m gpu tests/gpu`. Needs torch, pytest and hf_usp only."""
