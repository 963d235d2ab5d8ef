"""The device, and the kernels that it is tested with."""

from __future__ import annotations

import pytest
import torch

from hf_usp.kernels import KERNELS, Kernel, Request, Softmax

SOFTMAX = Softmax(0.125)
# Kernels that torch carries have to run; the packages are optional.
TORCHS = ("cuda_flash", "efficient", "blockwise")
OPTIONAL = ("flash_attn", "fa3", "fa4", "cudnn")


def cuda_kernels() -> list[str]:
    """The kernels that are tested: without a GPU those of torch, which then fail for want of one."""
    if not torch.cuda.is_available():
        return list(TORCHS)
    request = Request(torch.device("cuda", torch.cuda.current_device()), torch.bfloat16, 64, 64, SOFTMAX)
    return [*TORCHS, *(name for name in OPTIONAL if KERNELS[name].why_not(request) is None)]


@pytest.fixture(scope="session")
def device() -> torch.device:
    if not torch.cuda.is_available():
        pytest.fail(f"torch {torch.__version__} finds no CUDA device: these tests need one")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(params=cuda_kernels())
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    # cuDNN computes long segments alone, as a rule; here it shall compute those of the cases.
    monkeypatch.setattr("hf_usp.kernels.cudnn.LEAST", 1)
    monkeypatch.setattr("hf_usp.kernels.cudnn.UNIT", 1)
    return KERNELS[request.param]


@pytest.fixture(params=["bfloat16", "float16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return torch.bfloat16 if request.param == "bfloat16" else torch.float16
