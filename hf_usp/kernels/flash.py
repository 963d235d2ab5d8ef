"""FlashAttention of every dialect: one kernel, which pads and aligns rows and reads a row of `dialects`.

Shape suffixes: T packed query rows, K packed key rows, H query heads, G kv heads, D key width, E value width.

All of them load rows 16 bytes at a time, so starts and strides must be multiples of 8 elements, and read the
log-sum-exp [H, T] as dense memory, whatever its strides say. Nobody checks either.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..compat import installed_version
from ..errors import UspKernelError
from .base import Request, Segments, Softmax
from .dialects import FA2, FA3, FA4, LANE, Dialect, Functions, Widths, arguments, torch_dialect

MAX_WIDTH = 256


class FlashKernel:
    """A dialect as a kernel. `functions` are those that `why_not` found last; a test gives its own."""

    def __init__(
        self,
        name: str,
        dialect: Callable[[], Dialect | str],
        functions: Functions | None = None,
        major: int | None = None,
    ) -> None:
        self.name, self._dialect, self._functions, self._major = name, dialect, functions, major

    def why_not(self, request: Request) -> str | None:
        dialect = self._dialect()
        if isinstance(dialect, str):
            return dialect
        if (reason := _why_not(dialect, request)) is not None:
            return reason
        found = dialect.load(request.named)
        self._functions = None if isinstance(found, str) else found
        return found if isinstance(found, str) else None

    def forward(
        self, q_THD: Tensor, k_KGD: Tensor, v_KGE: Tensor, segments: Segments, softmax: Softmax
    ) -> tuple[Tensor, Tensor]:
        dialect, functions = self._ready()
        width, value_width = self._widths(dialect, q_THD, v_KGE)
        q, k, v = operand(q_THD, width), operand(k_KGD, width), operand(v_KGE, value_width)
        out, lse_HT = dialect.forward(functions.forward, q, k, v, arguments(segments, softmax))
        return out[..., : v_KGE.shape[2]], lse_HT

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
        dialect, functions = self._ready()
        width, value_width = self._widths(dialect, q_THD, v_KGE)
        q, k, dout, v, out = (
            *(operand(x, width) for x in (q_THD, k_KGD)),
            *(operand(x, value_width) for x in (dout_THE, v_KGE, out_THE)),
        )
        given = arguments(segments, softmax)
        dq, dk, dv = dialect.backward(functions.backward, dout, q, k, v, out, lse_HT.contiguous(), given)
        head_dim = q_THD.shape[2]
        return dq[..., :head_dim], dk[..., :head_dim], dv[..., : v_KGE.shape[2]]

    def _ready(self) -> tuple[Dialect, Functions]:
        dialect = self._dialect()
        found = dialect if isinstance(dialect, str) else self._functions or dialect.load(False)
        if isinstance(dialect, str) or isinstance(found, str):
            remedy = "leave kernel=None to let hf_usp choose"
            raise UspKernelError(f"kernel={self.name!r}", rule=str(found), remedy=remedy)
        self._functions = found
        return dialect, found

    def _widths(self, dialect: Dialect, q_THD: Tensor, v_KGE: Tensor) -> Widths:
        device = q_THD.device
        major = self._major or (torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 8)
        widths = dialect.widths(major, q_THD.shape[2], v_KGE.shape[2])
        assert widths is not None, "why_not refuses other widths"
        return widths


def operand(x_LHD: Tensor, width: int) -> Tensor:
    """The same rows and heads, zero-padded to a width that the kernels take, aligned; copied only where needed."""
    x_LHD = x_LHD if x_LHD.shape[-1] == width else pad(x_LHD, (0, width - x_LHD.shape[-1]))
    *outer, last = x_LHD.stride()
    if last == 1 and x_LHD.storage_offset() % LANE == 0 and all(stride % LANE == 0 for stride in outer):
        return x_LHD
    return x_LHD.clone(memory_format=torch.contiguous_format)


def _why_not(dialect: Dialect, request: Request) -> str | None:
    """Why a dialect cannot compute such tensors here, installed or not."""
    widest = max(request.head_dim, request.value_dim)
    if request.device.type != "cuda":
        return f"it computes on CUDA devices, the tensors are on {request.device.type}"
    if request.dtype not in (torch.float16, torch.bfloat16):
        return f"FlashAttention computes in float16 and bfloat16, not in {request.dtype}: train with bf16=True"
    if widest > MAX_WIDTH:
        return f"FlashAttention takes heads of at most {MAX_WIDTH}, not {widest}"
    if request.softmax.softcap is not None and not dialect.softcap:
        return f"{dialect.title} has no softcap; the packages of FlashAttention have"
    if (reason := why_not_cuda(request.device)) is not None:
        return reason
    capability = torch.cuda.get_device_capability(request.device)
    if not dialect.majors[0] <= capability[0] <= dialect.majors[1]:
        found = ".".join(map(str, capability))
        return f"{dialect.title} needs compute capability {dialect.needs}, this device has {found}"
    if dialect.widths(capability[0], request.head_dim, request.value_dim) is None:
        return f"{dialect.title} takes no heads of width {request.widths} on this device"
    if widest > dialect.deterministic_width and torch.are_deterministic_algorithms_enabled():
        return f"{dialect.title} has no deterministic backward for heads wider than {dialect.deterministic_width}"
    return None


def why_not_cuda(device: torch.device) -> str | None:
    """Why kernels for NVIDIA's devices cannot run at all."""
    if torch.version.hip is not None:
        return "it is not checked on ROCm, whose flash attention is another program"
    if not torch.cuda.is_available():
        return f"torch {installed_version('torch')} finds no CUDA device"
    return None


FLASH_KERNELS = (
    FlashKernel("flash_attn", lambda: FA2),
    FlashKernel("cuda_flash", torch_dialect),
    FlashKernel("fa3", lambda: FA3),
    FlashKernel("fa4", lambda: FA4),
)
