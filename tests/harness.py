"""The set-up that tests share: a fresh Accelerate, arguments of the stock Trainer on a CPU."""

from __future__ import annotations

from typing import Any


def fresh_accelerate() -> None:
    """Forget the process's accelerator, as the start of another program would."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def training_arguments(folder: str, **settings: Any) -> Any:
    """`TrainingArguments` on the CPU that report nothing and write into `folder`."""
    from transformers import TrainingArguments

    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False}
    return TrainingArguments(output_dir=folder, **quiet | settings)
