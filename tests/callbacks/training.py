"""A short run of the stock Trainer that saves checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

import hf_usp
from hf_usp.callbacks.resume import ResumeGuard

from ..harness import fresh_accelerate, training_arguments
from ..tiny import rows, tiny_model


@contextmanager
def deterministic_algorithms_as_before() -> Iterator[None]:
    """`full_determinism=True` stays switched on in the process; it also fills new memory with NaN."""
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def train(
    folder: str,
    sharded: bool,
    resume: str | None = None,
    count: int = 14,
    first: int = 0,
    watched: bool = True,
    accumulation: int = 2,
    changes: dict[str, Any] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """The stock Trainer for four steps, saving every second."""
    from transformers import Trainer

    fresh_accelerate()
    config = hf_usp.UspParallelismConfig(cp_size=2, ulysses_degree=1) if sharded else None
    args = training_arguments(
        folder,
        seed=11,
        parallelism_config=config,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulation,
        max_steps=4,
        save_steps=2,
        logging_steps=1,
        learning_rate=0.01,
        **settings,
    )
    model = tiny_model("qwen2", "usp" if sharded else "sdpa", **changes or {})
    seen: list[list[int]] = []
    model.register_forward_pre_hook(lambda m, a, k: seen.append(k["input_ids"][:, 0].tolist()), with_kwargs=True)
    callbacks: list[Any] = [ResumeGuard()] if watched else []
    trainer = Trainer(model=model, args=args, train_dataset=rows(count + first, 41)[first:], callbacks=callbacks)
    with deterministic_algorithms_as_before():
        trainer.train(resume_from_checkpoint=resume)
    return {"weights": {name: p.detach().clone() for name, p in model.state_dict().items()}, "seen": seen}
