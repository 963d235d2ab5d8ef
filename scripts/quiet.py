"""Imported before Transformers: silences what other libraries log on a CPU and a newcomer takes for an error."""

from __future__ import annotations

import logging

# bitsandbytes, which the Trainer imports with PEFT, misses a package for products in 4 bits; no script here has any.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# DeepSpeed, which Accelerate imports where it is installed, looks for a GPU.
logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
