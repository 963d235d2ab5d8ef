"""The self-check: sharded and unsharded forwards of a short batch are compared."""
