"""A training step at its real size without its memory: what is alive in it, by phase and by what made it.

torch's `FakeTensorMode` gives tensors shapes and no memory, the "fake" process group messages that go nowhere. Under
both the real program runs: the model of a config, its sharded forward and backward, the loss and MLPs in chunks,
checkpointing, offloading, FSDP2 with the units of Accelerate. Every storage that an operator makes is counted while it
is alive (`live_bytes.py`). It takes seconds on a CPU; nothing is computed.

The attention kernel is a stand-in that makes what the CUDA kernel makes: results, log-sum-exp and workspace
(`hf_usp.planner.hardware.WORKSPACES`). The CPU path of another kernel would make other temporaries. The state of the
optimizer is added by its size. An allocator's rounding and NCCL's buffers are not seen.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..attention import call as attention_call
from ..batch.context import ForwardContext, ShardOptions
from ..batch.documents import find_documents
from ..batch.layout import make_layout
from ..batch.shard import shard_tensors
from ..batch.sharded_tensors import ContextMask
from ..compat import (
    checkpointing_name,
    fake_tensors,
    local_part,
)
from ..distributed.mesh import UspMesh
from ..errors import UspConfigError
from ..integrations.transformers import apply_memory_options
from ..kernels import Request, Segments, Softmax
from ..memory import chunked_loss, tiled_layer
from ..memory.activation_offload import offload_checkpoints
from ..memory.offloader import ActivationOffloader, OffloadedTensor
from ..memory.tiled_mlp import tiled_forward
from ..planner.hardware import WORKSPACES, Workspace
from ..planner.workload import Degrees, TrainingStep
from ..utils.patches import AttributePatches
from .live_bytes import LiveBytes
from .simulated_phases import Phases


def simulate(
    config: Any, degrees: Degrees, job: TrainingStep, *, backward: bool = True, inventory: bool = True
) -> LiveBytes:
    """The bytes of rank 0 in a step, weights and optimizer in `LiveBytes.there`.

    Args:
        config: config of a causal language model; its weights are never made.
        degrees: ranks; no tensor parallelism.
        job: the step. Weights are in bf16 (`element` 2) or fp32; with 12 bytes of optimizer state in bf16 they are the
            fp32 copies of Accelerate's FSDP2, which computes in bf16.
        backward: a training step; else a forward of evaluation.
        inventory: also note what made the bytes of each phase.

    Raises:
        UspConfigError: for tensor parallelism, or where a process group exists.
    """
    _check(degrees)
    model, mode = _model(config, job), fake_tensors().FakeTensorMode(allow_non_fake_inputs=True)
    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=degrees.ranks)
    try:
        mesh = UspMesh.build(ring_degree=degrees.ring, ulysses_degree=degrees.ulysses)
        batch = _batch(job, mesh, mode)
        if job.shard_params:
            _shard(model, degrees, job)
        with mode, _stand_ins(WORKSPACES[job.kernel]) as patches, torch.set_grad_enabled(backward):
            model.to_empty(device="cpu")
            lasting = [local_part(p) for p in model.parameters()]
            live = LiveBytes(lasting, inventory)
            if job.offload and backward:
                offload_checkpoints(model, ToHost(live))
            watch = Phases(model, live, patches)
            for _ in range(2 if job.accumulate and backward else 1):
                live.phases.clear()
                watch.backward = False
                with live:
                    loss = model(**batch, use_cache=False).loss
                    if backward:
                        watch.begin_backward()
                        loss.backward()
        live.optimizer = (8 if _fp32_copies(job) else job.optimizer) * sum(x.numel() for x in lasting)
        return live
    finally:
        dist.destroy_process_group()


def _check(degrees: Degrees) -> None:
    if degrees.tp > 1:
        raise UspConfigError(
            f"a simulation with tensor parallelism {degrees.tp}",
            rule="what is simulated is sequence and data parallelism",
            remedy="simulate a split with tp 1 (--tp 1)",
        )
    if dist.is_initialized():
        raise UspConfigError(
            "a simulation in a process that has a process group",
            rule="a simulation makes a process group of its own, of ranks that do not exist",
            remedy="run hf-usp plan --simulate as a process of its own, without torchrun",
        )


def _fp32_copies(job: TrainingStep) -> bool:
    """Whether weights are in fp32 and gathered in bf16."""
    return job.shard_params and job.element == 2 and job.optimizer == 12


def _model(config: Any, job: TrainingStep) -> Any:
    """The model on the meta device, with what saves memory attached."""
    from transformers import AutoModelForCausalLM

    dtype = torch.float32 if job.element == 4 or _fp32_copies(job) else torch.bfloat16
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="usp", dtype=dtype)
    if job.checkpointing:
        getattr(model, f"{checkpointing_name()}_enable")({"use_reentrant": False})
    apply_memory_options(
        model,
        job.loss_chunk_size,
        job.mlp_chunk_size,
        False,
        layer_chunk_size=job.layer_chunk_size,
        head_groups=job.head_groups,
        keep_attention=job.keep_attention,
    )
    for tiled in filter(None, map(tiled_forward, model.modules())):
        tiled.tried = True  # a trial compares values, which there are none of
    for layer in filter(None, map(tiled_layer.tiled_layer, model.modules())):
        layer.sizes = replace(layer.sizes, unshared=_Every())
    return model.train()


def _batch(job: TrainingStep, mesh: UspMesh, mode: Any) -> dict[str, Any]:
    """The local batch of a full one; made outside of the mode, as documents are found by looking at values."""
    ids = torch.zeros(job.rows, job.tokens, dtype=torch.int64)
    documents = find_documents(job.rows, job.tokens, None, None, None)
    layout = make_layout(documents, job.rows, job.tokens, mesh)
    context = ForwardContext(layout, ShardOptions(largest_position=False), manual_loop=True)
    batch = shard_tensors({"input_ids": ids, "labels": ids}, context)
    mask = batch.pop("attention_mask")
    batch.pop("num_labels")
    fake = _fake_mask(mask, mode)
    return {
        "attention_mask": fake,
        **{name: mode.from_tensor(x) if isinstance(x, Tensor) else x for name, x in batch.items()},
    }


def _fake_mask(mask: ContextMask, mode: Any) -> Any:
    """A fake tensor that is a mask with a context as well: operators on fake tensors and other subclasses are refused.

    `to` returns it; other operators give plain fake tensors.
    """
    fake = fake_tensors().FakeTensor

    def torch_function(cls: type, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        return args[0] if func is Tensor.to else fake.__torch_function__(func, types, args, kwargs or {})

    both = type("FakeMask", (ContextMask, fake), {"__torch_function__": classmethod(torch_function)})
    found = both(mode, torch.empty(mask.shape, dtype=mask.dtype, device="meta"), torch.device("cpu"))
    found.handle = mask.handle
    return found


def _shard(model: Any, degrees: Degrees, job: TrainingStep) -> None:
    """FSDP2 with the units of Accelerate 1.15: layers, the embedding, final norm and head, the rest."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from transformers.modeling_layers import GradientCheckpointingLayer

    half = torch.bfloat16
    policy = MixedPrecisionPolicy(half, half, half) if _fp32_copies(job) else None
    options: dict[str, Any] = {
        "mesh": init_device_mesh("cpu", (degrees.cp * degrees.dp_shard,)),
        "mp_policy": policy or MixedPrecisionPolicy(),
    }
    for layer in [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]:
        fully_shard(layer, **options)
    embedding, head, norm = model.get_input_embeddings(), model.get_output_embeddings(), model.get_decoder().norm
    tied = embedding.weight is head.weight
    if not tied:
        fully_shard(embedding, **options)
    fully_shard([norm, embedding, head] if tied else [norm, head], **options, reshard_after_forward=False)
    fully_shard(model, **options)


def as_bytes(live: LiveBytes) -> dict[str, int]:
    """Bytes of a rank at the peak of each phase."""
    return {name: live.there + live.optimizer + phase.peak for name, phase in live.phases.items()}


def report(live: LiveBytes, most: int = 12) -> str:
    """The phases of a simulated step, each in the layer where most is alive, and what is alive at the peak."""
    found: dict[str, tuple[str, int]] = {}
    for name, phase in live.phases.items():
        kind = re.sub(r"layer \d+ ", "", name)
        found[kind] = max(found.get(kind, (name, -1)), (name, phase.peak), key=lambda pair: pair[1])
    lasting, peak = live.there + live.optimizer, max(live.phases, key=lambda name: live.phases[name].peak)
    lines = [
        f"simulated: {(lasting + live.peak) / 1e9:.2f} GB a rank, in `{peak}`; {lasting / 1e9:.2f} GB of them weights "
        f"and optimizer; {live.host / 1e9:.2f} GB of host memory",
        "",
        *(f"  {name:48} {(lasting + size) / 1e9:8.2f} GB" for name, size in found.values()),
        "",
        f"alive in `{peak}`, by the phase, operator and dtype that made it:",
    ]
    made = sorted(live.phases[peak].made.items(), key=lambda pair: -pair[1])
    lines += [f"  {size / 1e9:8.2f} GB  {' '.join(key).replace('torch.', '')}" for key, size in made[:most]]
    return "\n".join(lines)


class StandInKernel:
    """Makes what a CUDA kernel makes."""

    name = "simulated"

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace

    def why_not(self, request: Request) -> str | None:
        return None

    def forward(
        self, q_THD: Tensor, k_KGD: Tensor, v_KGE: Tensor, segments: Segments, softmax: Softmax
    ) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp."""
        tokens, heads, _ = q_THD.shape
        return q_THD.new_empty(tokens, heads, v_KGE.shape[2]), q_THD.new_empty(heads, tokens, dtype=torch.float32)

    def backward(
        self,
        dout_THE: Tensor,
        q_THD: Tensor,
        k_KGD: Tensor,
        v_KGE: Tensor,
        out_THE: Tensor,
        lse_HT: Tensor,
        segments: Segments,
        softmax: Softmax,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients; workspace while they are made."""
        shared_by = q_THD.shape[1] // k_KGD.shape[1]
        size = self.workspace.bytes(q_THD.numel(), k_KGD.numel() + v_KGE.numel(), shared_by)
        workspace = q_THD.new_empty(int(size), dtype=torch.uint8)
        grads = tuple(x.new_empty(x.shape) for x in (q_THD, k_KGD, v_KGE))
        del workspace
        return grads[0], grads[1], grads[2]


@contextmanager
def _stand_ins(workspace: Workspace) -> Iterator[AttributePatches]:
    """In the block every attention call takes the stand-in, and a loss in chunks takes fake weights."""
    patches, kernel = AttributePatches(), StandInKernel(workspace)
    patches.set(attention_call, "choose_kernel", lambda *args: kernel)
    patches.set(chunked_loss, "_is_plain", lambda weight: weight.ndim == 2)
    patches.set(tiled_layer, "verdict", lambda *args: None)  # a trial compares values, too
    try:
        yield patches
    finally:
        patches.undo()


class _Every:
    """References of whatever gradient: fake tensors have others than real ones, of which nobody else has these."""

    def __contains__(self, counts: object) -> bool:
        return True


class ToHost(ActivationOffloader):
    """Copies lie in host memory, which does not count; streams are nothing."""

    def __init__(self, live: LiveBytes) -> None:
        super().__init__()
        self.live = live

    def offload(self, tensor: Tensor) -> Any:
        return super().offload(_without_streams(tensor))

    def is_far(self, tensor: Tensor) -> bool:
        return tensor.is_floating_point()

    def make_room(self, *sizes: Any) -> None:
        return None

    def is_on_host(self, tensor: Tensor) -> bool:
        return self.live.is_left_out(tensor)

    def module(self, device: torch.device) -> Any:
        return _NoStreams

    def buffer(self, tensor: Tensor) -> Tensor:
        host = torch.empty_like(tensor)
        self.live.leave_out(host)
        return host

    def copy_back(self, offloaded: OffloadedTensor) -> Tensor:
        return _without_streams(torch.empty_like(offloaded.host))


class _NoStreams:
    """In the place of `torch.cuda`."""

    @classmethod
    def Stream(cls, device: torch.device) -> type[_NoStreams]:  # noqa: N802
        return cls

    current_stream = Stream

    @staticmethod
    def wait_stream(other: Any) -> None:
        return None

    @classmethod
    def record_event(cls) -> type[_NoStreams]:
        return cls

    @staticmethod
    def synchronize() -> None:
        return None

    @staticmethod
    def stream(stream: Any) -> AbstractContextManager[None]:
        return nullcontext()


def _without_streams(tensor: Tensor) -> Tensor:
    """The tensor; that a stream uses it is nothing to note on the CPU."""
    vars(tensor)["record_stream"] = lambda stream: None
    return tensor
