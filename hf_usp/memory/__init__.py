"""Options that save memory: the loss and MLPs in chunks, activation checkpointing and offloading."""
