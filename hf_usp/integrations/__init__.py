"""Accelerate and DeepSpeed."""
