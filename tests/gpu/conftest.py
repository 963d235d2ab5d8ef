"""The device, and the kernels that it is tested with."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from hf_usp.kernels import KERNELS, Kernel

# The package is optional; torch's operator is not.
CUDA_KERNELS = ["cuda_flash", *(["flash_attn"] if find_spec("flash_attn") else [])]


@pytest.fixture(scope="session")
def device() -> torch.device:
    if not torch.cuda.is_available():
        pytest.fail(f"torch {torch.__version__} finds no CUDA device: these tests need one")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(params=CUDA_KERNELS)
def kernel(request: pytest.FixtureRequest) -> Kernel:
    return KERNELS[request.param]


@pytest.fixture(params=["bfloat16", "float16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return torch.bfloat16 if request.param == "bfloat16" else torch.float16
