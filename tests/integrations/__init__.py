"""Tests with the Trainer, Accelerate, FSDP2, DeepSpeed, PEFT and TRL."""
