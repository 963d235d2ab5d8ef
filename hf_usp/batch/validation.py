"""Checks of a batch before it is sharded: kinds, shapes and dtypes of its entries."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import UspBatchError

# Per-token inputs; our padding repeats a row's last token. Everything else of a batch must not depend on the sequence.
PER_TOKEN = ("input_ids", "inputs_embeds", "token_type_ids", "position_ids")
# Described by the layout from here on; a model must not see those of the full batch.
DESCRIBED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
TENSORS = {*PER_TOKEN, "labels", "shift_labels", "attention_mask", "cu_seq_lens_q", "cu_seq_lens_k"}
WHOLE = TENSORS - {"attention_mask", "inputs_embeds"}


def check_entries(batch: Mapping[str, Any], rows: int, length: int) -> None:
    """Refuse what does not fit `rows` x `length` tokens, or that we do not know how to cut."""
    for name, value in batch.items():
        if isinstance(value, Tensor):
            _check_kind(name, value)
            _check_tensor(name, value, rows, length)
        elif name in TENSORS and value is not None:
            raise UspBatchError(
                f"{name} of type {type(value).__name__} in the batch",
                rule=f"{name} is a tensor",
                remedy=f"pass torch.as_tensor({name}), or a data collator that makes tensors",
            )


def check_token_count(count: Any) -> None:
    """Refuse a number of tokens that is none, or that has been cast, by a wrapper for example.

    bf16 knows no whole number above 256. A tensor may hold 0: the caller has counted a batch without targets, whose
    loss is NaN in one process, too.
    """
    if isinstance(count, Tensor) and count.dtype in (torch.bfloat16, torch.float16):
        raise UspBatchError(
            f"num_items_in_batch in {count.dtype}",
            rule="a count of tokens is a whole number or at least fp32; FSDP2 with mixed precision casts every "
            "floating-point tensor that a model gets",
            remedy="pass it as an integer tensor or as a Python number",
        )
    if count is None:
        return
    counted = isinstance(count, Tensor) and count.numel() == 1 and not count.is_complex() and not count.is_meta
    value = count.item() if counted else count
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < 0 or (value == 0 and not counted):
        raise UspBatchError(
            f"num_items_in_batch={count!r:.100}",
            rule="it is the number of label tokens of the full batch, above 0",
            remedy="pass (labels[:, 1:] != -100).sum() of all batches of the step, or leave it out",
        )


def _check_kind(name: str, value: Tensor) -> None:
    """Refuse tensors without values, and those that are no numbers of the kind that an entry holds."""
    if name not in TENSORS:
        return
    whole = not (value.is_floating_point() or value.is_complex())
    if value.layout != torch.strided or value.is_meta or value.is_complex():
        found = f"{name}, {value.dtype} and {value.layout}, on {value.device}"
    elif value.dtype in (torch.bool, torch.uint8) and name in ("input_ids", "labels", "shift_labels"):
        found = f"{name} in {value.dtype}"  # which holds no IGNORED, or no vocabulary
    elif not whole and name in WHOLE or (not value.is_floating_point() and name == "inputs_embeds"):
        found = f"{name} in {value.dtype}"
    else:
        return
    kind = "floating-point numbers" if name == "inputs_embeds" else "integers"
    raise UspBatchError(
        found,
        rule=f"{name} holds {kind} in a dense tensor",
        remedy=f"build {name} with torch.tensor, or cast it (x.long(), x.to_dense())",
    )


def _check_tensor(name: str, value: Tensor, rows: int, length: int) -> None:
    """Refuse tensors that do not fit the tokens, or that we do not know how to cut."""
    per_token = {*PER_TOKEN, "labels", "shift_labels", "attention_mask"}
    if name in per_token:
        dims = value.shape[-2:] if name == "position_ids" else value.shape[:2]
        if name == "attention_mask" and value.ndim == 4:
            raise UspBatchError(
                f"attention_mask of shape {tuple(value.shape)}",
                rule="an attention mask marks padding, [batch, tokens]; an arbitrary 4D mask cannot be sharded exactly",
                remedy="describe documents with position_ids that restart, and padding with a 2D attention_mask",
            )
        fits = tuple(dims) == (rows, length) or (name == "position_ids" and tuple(dims) == (1, length))
        if not fits or (value.ndim != 2 and name not in ("inputs_embeds", "position_ids")):
            raise UspBatchError(
                f"{name} of shape {tuple(value.shape)} for {rows} row(s) of {length} tokens",
                rule=f"{name} has one entry per token: ({rows}, {length})",
                remedy=f"build {name} from the same rows as the tokens, with the same padding and truncation",
            )
    elif name not in (*DESCRIBED, "num_items_in_batch", "logits_to_keep") and value.ndim > 0:
        raise UspBatchError(
            f"a tensor {name} of shape {tuple(value.shape)} in the batch",
            rule="hf_usp shards " + ", ".join(sorted(per_token)) + "; it does not guess how to shard anything else",
            remedy=f"remove {name} from the batch (Trainer: remove_unused_columns=True, or a data collator)",
        )
