"""A training report in the Trainer's own log: speed, useful work, bytes, padding, balance, memory.

    from hf_usp.callbacks import UspMetricsCallback

    trainer = Trainer(...)
    UspMetricsCallback(trainer)  # that is all; TensorBoard, Weights & Biases, trackio ... show usp/... beside the loss

It only looks: nothing of a run changes with it or without it. A report goes into the same log entry as the loss, so its
callback comes before those that write logs.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import gather
from torch import Tensor
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState

from ..batch.sharded_tensors import context_of
from ..compat import profiler_enabled
from ..errors import UspConfigError
from ..models.find import find_model
from ..planner.hardware import MACHINES, recognised
from .counting import Seen, StepCounts, count, work_per_token
from .overlap import exposed_share

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

PREFIX = "usp/"


class UspMetricsCallback(TrainerCallback):
    """Adds to every entry of the training log, over the steps since the last one:

    | name | what it is |
    |---|---|
    | `usp/tokens_per_second` | tokens of all processes, padding not counted |
    | `usp/tflops_per_rank` | model operations a second and process, 10^12: products of weights and what the mask asks |
    | `usp/mfu` | the same as a share of `peak_flops` |
    | `usp/gb_sent_per_step` | bytes that attention's exchanges send in a step, of the process that sends most, 10^9 |
    | `usp/padding_share` | places that hold padding, of rows and of ours |
    | `usp/balance` | mask area of the busiest rank over the mean one, 1 is perfect; every rank waits for the busiest |
    | `usp/peak_memory_gb` | of the process with the highest one: on a GPU what torch allocated, on CPU resident, 10^9 |
    | `usp/exposed_communication` | with `profile_step`, once: share of that step spent waiting for other ranks |

    Args:
        trainer: the report adds itself to its callbacks. Attach it before `train`.
        peak_flops: operations a second of one device in the run's dtype; None: of a known GPU
            under bf16 or fp16 (`hf_usp.planner.hardware`), else `usp/mfu` is left out.
        profile_step: number of the optimizer step to profile with torch.profiler, for `usp/exposed_communication`;
            None profiles nothing. A step that somebody else profiles is left alone.
        trace: folder for the trace of that step, one file per process, which chrome://tracing and Perfetto open.

    Raises:
        UspConfigError: a peak or step below 1, or a trace without a step.
    """

    def __init__(
        self,
        trainer: Trainer,
        *,
        peak_flops: float | None = None,
        profile_step: int | None = None,
        trace: str | Path | None = None,
    ) -> None:
        _check(peak_flops, profile_step, trace)
        if peak_flops is None and (trainer.args.bf16 or trainer.args.fp16) and torch.cuda.is_available():
            peak_flops = known_peak(torch.cuda.get_device_name(trainer.args.device))
        self.peak_flops, self.profile_step, self.trace = peak_flops, profile_step, trace
        self.accelerator = trainer.accelerator
        assert isinstance(trainer.model, torch.nn.Module)
        model = find_model(trainer.model)
        self.work_per_token = work_per_token(model)  # before FSDP and ZeRO shard the weights
        self.counts = StepCounts()
        self.under_way: list[Seen] = []
        self.seconds, self.steps = 0.0, 0
        self.since: float | None = None
        self.profile: torch.profiler.profile | None = None
        self.exposed: float | None = None
        model.register_forward_hook(self._see, with_kwargs=True)
        # Before the callbacks that write logs, which get what we add. The list is all there is to order them by.
        trainer.callback_handler.callbacks.insert(0, self)

    def _see(self, model: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """After a forward of the model; the context is in the keywords that our hooks before it left."""
        if not model.training or self.since is None:
            return
        context = context_of(*kwargs.values())
        if context is not None:
            self.under_way.append(Seen.after_forward(context))
            return
        tokens = kwargs.get("input_ids", kwargs.get("inputs_embeds"))
        if tokens is None:
            return
        mask, places = kwargs.get("attention_mask"), tokens.shape[0] * tokens.shape[1]
        self.counts.places += places
        self.counts.tokens += int(mask.sum()) if isinstance(mask, Tensor) and mask.ndim == 2 else places

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The clock runs; a profile begins with its step."""
        if self.since is None:
            self.since = time.perf_counter()
            if args.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(args.device)
        if self.profile_step == state.global_step + 1 and not profiler_enabled():
            self.profile = torch.profiler.profile()
            self.profile.start()

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A micro-batch is through its backward: its context can be counted and let go."""
        for seen in self.under_way:
            count(seen, self.counts)
        self.under_way.clear()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """So is the last one of a step."""
        self.on_substep_end(args, state, control)
        self.steps += 1
        self._add_time()
        if self.profile is not None:
            if args.device.type == "cuda":
                torch.cuda.synchronize(args.device)
            self.profile.stop()
            self.exposed = exposed_share(self.profile)
            if self.trace is not None:
                Path(self.trace).mkdir(parents=True, exist_ok=True)
                name = f"step-{state.global_step}-rank-{self.accelerator.process_index}.json"
                self.profile.export_chrome_trace(str(Path(self.trace) / name))
            self.profile = None

    def _add_time(self) -> None:
        now = time.perf_counter()
        self.seconds += now - (self.since or now)
        self.since = now

    def _skip_time(self) -> None:
        """Time since the last step was not training."""
        self.since = time.perf_counter() if self.since is not None else None

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Evaluation does not count."""
        self._skip_time()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Nor does saving."""
        self._skip_time()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """An entry with a loss gets the figures of the steps since the last such entry. Every rank comes here."""
        if logs is None or "loss" not in logs or self.steps == 0:
            return
        self._add_time()  # the Trainer read the loss: the device has done what was asked of it
        figures = self._figures(args)
        logs.update(figures)
        state.log_history[-1].update(figures)
        self.counts, self.seconds, self.steps, self.exposed = StepCounts(), 0.0, 0, None
        self._skip_time()

    def _figures(self, args: TrainingArguments) -> dict[str, float]:
        counts, world = self.counts, args.world_size
        model_parallel_size = self._model_parallel_size()
        exposed = -1.0 if self.exposed is None else self.exposed
        mine = (
            counts.tokens / model_parallel_size,
            counts.places / model_parallel_size,
            counts.pairs / model_parallel_size,
            counts.path / model_parallel_size,
            float(counts.sent),
            _peak_memory(args.device),
            exposed,
            self.seconds,
        )
        # MPS has no fp64; sums of these few numbers do not need it there.
        dtype = torch.float32 if args.device.type == "mps" else torch.float64
        rows = gather(torch.tensor([mine], dtype=dtype, device=args.device)).cpu()
        tokens, places, pairs, path = rows[:, :4].sum(0).tolist()
        sent, memory, exposed, seconds = rows[:, 4:].max(0).values.tolist()
        # A pair costs one product with a key and one with a value, forward; twice that backward.
        per_rank = (tokens * self.work_per_token + 3 * 2 * pairs) / world / seconds
        figures = {"tokens_per_second": tokens / seconds, "tflops_per_rank": per_rank / 1e12}
        if self.peak_flops is not None:
            figures["mfu"] = per_rank / self.peak_flops
        figures["padding_share"] = 1 - tokens / places if places else 0.0
        if pairs:
            figures |= {"balance": path / pairs, "gb_sent_per_step": sent / self.steps / 1e9}
        figures["peak_memory_gb"] = memory / 1e9
        if exposed >= 0:
            figures["exposed_communication"] = exposed
        return {PREFIX + name: value for name, value in figures.items()}

    def _model_parallel_size(self) -> int:
        """Ranks that see the same batch: tensor-parallel ones and those of a context-parallel group."""
        config = AcceleratorState().parallelism_config  # that of an accelerator tells of groups
        return 1 if config is None else config.cp_size * config.tp_size


def known_peak(device_name: str) -> float | None:
    """16-bit operations a second of a GPU that is among the presets, by the name its driver has for it."""
    name = recognised(device_name)
    return None if name is None else MACHINES[name].flops


def _peak_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    import resource  # not on every platform

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def _check(peak_flops: float | None, profile_step: int | None, trace: str | Path | None) -> None:
    if peak_flops is not None and not peak_flops >= 1:
        raise UspConfigError(
            f"peak_flops={peak_flops}",
            rule="it is the operations a second of one device",
            remedy="pass what its data sheet says, such as 989e12 for an H100 in bf16, or leave it out",
        )
    if profile_step is not None and profile_step < 1:
        raise UspConfigError(
            f"profile_step={profile_step}",
            rule="optimizer steps are counted from 1",
            remedy="pass profile_step=3, say, or leave it out",
        )
    if trace is not None and profile_step is None:
        raise UspConfigError(
            f"trace={str(trace)!r} without profile_step",
            rule="a trace is that of one step",
            remedy="pass profile_step=3",
        )
