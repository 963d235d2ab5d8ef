"""Which kernel is chosen, what a refusal says, and that nothing is imported before it is needed."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from hf_usp.errors import UspKernelError
from hf_usp.kernels import KERNELS, Softmax, check_installed, choose_kernel, kernel_report

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SOFTMAX = Softmax(0.125)


@pytest.fixture
def no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without flash-attn, whatever is installed here."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)


def test_order_of_preference() -> None:
    assert list(KERNELS) == ["flash_attn", "cuda_flash", "cpu_flash", "eager"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_cpu_takes_cpu_flash(dtype: torch.dtype) -> None:
    assert choose_kernel(CPU, dtype, 64, SOFTMAX).name == "cpu_flash"


def test_softcap_on_cpu_takes_eager() -> None:
    assert choose_kernel(CPU, torch.float32, 64, Softmax(0.125, softcap=30.0)).name == "eager"


@pytest.mark.filterwarnings("ignore:usp. no flash attention")
def test_a_gpu_without_the_package_takes_torchs_operator(no_package: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert choose_kernel(GPU, torch.bfloat16, 64, SOFTMAX).name == "cuda_flash"
    assert choose_kernel(GPU, torch.bfloat16, 64, Softmax(0.125, softcap=30.0)).name == "eager"
    assert choose_kernel(GPU, torch.float32, 64, SOFTMAX).name == "eager"


def test_a_slow_kernel_on_a_gpu_is_not_taken_in_silence(no_package: None) -> None:
    with pytest.warns(UserWarning, match=r"no flash attention for torch\.float32 .*'eager'.*not installed.*train with"):
        assert choose_kernel(GPU, torch.float32, 64, SOFTMAX).name == "eager"


def test_a_kernel_that_no_dtype_can_use_here(no_package: None) -> None:
    check_installed(None, GPU)
    check_installed("eager", GPU)
    check_installed("cpu_flash", CPU)
    for name in ("flash_attn", "flash4"):
        with pytest.raises(UspKernelError, match=f"kernel='{name}'"):
            check_installed(name, GPU)


def test_report_gives_a_reason_for_every_kernel_that_cannot(no_package: None) -> None:
    reasons = dict(kernel_report(CPU, torch.bfloat16, 64, SOFTMAX))
    assert list(reasons) == list(KERNELS)
    assert reasons["flash_attn"] == (
        "the package flash-attn is not installed: pip install flash-attn --no-build-isolation"
    )
    assert reasons["cuda_flash"] == "it computes on CUDA devices, the tensors are on cpu"
    assert reasons["cpu_flash"] is None and reasons["eager"] is None


@pytest.mark.parametrize("device", [CPU, GPU])
def test_a_kernel_that_is_not_installed(no_package: None, device: torch.device) -> None:
    with pytest.raises(UspKernelError) as refusal:
        choose_kernel(device, torch.bfloat16, 64, SOFTMAX, "flash_attn")
    assert "flash-attn is not installed: pip install flash-attn --no-build-isolation" in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "device", "dtype", "width", "softmax", "reason"),
    [
        ("cuda_flash", CPU, torch.bfloat16, 64, SOFTMAX, "tensors are on cpu"),
        ("cuda_flash", GPU, torch.float32, 64, SOFTMAX, "not in torch.float32"),
        ("cuda_flash", GPU, torch.bfloat16, 264, SOFTMAX, "at most 256, not 264"),
        ("cuda_flash", GPU, torch.bfloat16, 64, Softmax(0.1, softcap=30.0), "no softcap"),
        ("cpu_flash", GPU, torch.float32, 64, SOFTMAX, "tensors are on cuda"),
        ("cpu_flash", CPU, torch.float32, 64, Softmax(0.1, softcap=30.0), "no softcap"),
        ("flash4", CPU, torch.float32, 64, SOFTMAX, "one of flash_attn, cuda_flash, cpu_flash, eager"),
    ],
)
def test_a_named_kernel_is_used_or_refused(
    name: str, device: torch.device, dtype: torch.dtype, width: int, softmax: Softmax, reason: str
) -> None:
    with pytest.raises(UspKernelError, match=reason) as refusal:
        choose_kernel(device, dtype, width, softmax, name)
    assert f"kernel={name!r}" in str(refusal.value) and "Remedy:" in str(refusal.value)


@pytest.mark.filterwarnings("ignore:usp. no flash attention")
def test_a_torch_without_cuda_is_a_reason(no_package: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UspKernelError, match="finds no CUDA device"):
        choose_kernel(GPU, torch.bfloat16, 64, SOFTMAX, "cuda_flash")
    assert choose_kernel(GPU, torch.bfloat16, 64, SOFTMAX).name == "eager"


def test_import_touches_neither_the_package_nor_cuda() -> None:
    program = (
        "import sys, torch, hf_usp.kernels\n"
        "assert 'flash_attn' not in sys.modules and not torch.cuda.is_initialized()\n"
        "hf_usp.kernels.kernel_report(torch.device('cpu'), torch.bfloat16, 64, hf_usp.kernels.Softmax(0.1))\n"
        "assert 'flash_attn' not in sys.modules and not torch.cuda.is_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
