"""`hf-usp check`: is this cluster right, and how fast is it? Started by torchrun or accelerate launch on every rank.

    torchrun --nproc_per_node 8 -m hf_usp check --model Qwen/Qwen3-8B --output check.json

`run` goes through stages (`stages.py` watches that no rank hangs): what is installed (`facts.py`), links (`links.py`),
exactness of the core and of a small copy of the model (`exact.py`), a soak. Everything that is found is a `Finding`
(`findings.py`); rank 0 prints the verdict and writes the file.
"""

from .issues import Finding
from .results import CheckOptions
from .run import run

__all__ = ["CheckOptions", "Finding", "run"]
