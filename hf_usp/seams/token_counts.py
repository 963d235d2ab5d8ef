"""Two places where the Trainer counts tokens over processes and takes no heed of those that share a batch.

Neither can be told from other calls by its arguments; each is put right by the narrowest means there is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

FLOOR_DIVISIONS = (torch.Tensor.__floordiv__, torch.Tensor.floor_divide, torch.floor_divide)


class Copies(int):
    """How many ranks share a batch: a number by which tensors are divided without rounding.

    Transformers 5.17 computes `num_items_in_batch // parallelism_config.non_data_parallel_size`. The count is summed
    over all ranks before and a multiple of the size, but not with `average_tokens_across_devices=False`: nine tokens of
    four ranks would count as two for each. Later versions ask a method of the Trainer and divide exactly.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        plain = [int(x) if isinstance(x, cls) else x for x in args]
        return (torch.true_divide if func in FLOOR_DIVISIONS else func)(*plain, **(kwargs or {}))


def gather_seen_once(gather: Callable[[Any], Any], copies: int) -> Callable[[Any], Any]:
    """`Accelerator.gather` that hands the Trainer one of every `copies` counts of input tokens.

    `Trainer._track_num_input_tokens` (`include_num_input_tokens_seen`) sums what it gathers from all processes. Its
    tensor looks like that of the Trainer's other counts, which do heed copies; only the caller tells them apart.
    """

    def gather_counts(tensor: Any) -> Any:
        gathered = gather(tensor)
        seen = sys._getframe(1).f_code.co_name == "_track_num_input_tokens"
        return gathered[::copies] if seen else gathered

    return gather_counts
