"""`hf-usp plan`: which degrees, will it fit, and how fast? Before anything runs.

    hf-usp plan --model Qwen/Qwen3-8B --tokens 131072 --gpus 16 --machine h100-nvlink

`request.py` turns words into sizes, `search.py` ranks every legal split with the roofline, `text.py` writes the table,
the Accelerate config and the launch line, `plot.py` draws memory against length. `choose.py`: the same for a run that
was given no ulysses degree.
"""

from .choose import choose_degree
from .request import PlanRequest, find_machine, read_model, request
from .search import Candidate, longest, longest_of_all, ranked

__all__ = [
    "Candidate",
    "PlanRequest",
    "choose_degree",
    "find_machine",
    "longest",
    "longest_of_all",
    "ranked",
    "read_model",
    "request",
]
