"""Which kernel is chosen, what a refusal says, and that nothing is imported before it is needed."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import pytest
import torch

import hf_usp
from hf_usp.errors import UspKernelError
from hf_usp.kernels import (
    KERNELS,
    Request,
    Softmax,
    check_installed,
    check_scores,
    choice_lines,
    choose_kernel,
    kernel_report,
)

from ..ranks import Ranks
from ..tiny import tiny_model
from . import fake_fa3, fake_fa4, fake_flash_attn

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SOFTMAX, CAPPED = Softmax(0.125), Softmax(0.125, softcap=30.0)
BF16, FP32 = torch.bfloat16, torch.float32
Patch = pytest.MonkeyPatch
slow = pytest.mark.filterwarnings("ignore:usp. no flash attention")


class Machine:
    """A machine with a GPU and packages that this one does not have."""

    def __init__(self, patch: Patch) -> None:
        self.patch, self.modules, self.versions = patch, {}, {}
        patch.setattr("hf_usp.kernels.packages._spec", self.modules.get)
        for place in ("packages", "dialects"):
            patch.setattr(f"hf_usp.kernels.{place}.installed_version", self.versions.get)
        self.gpu(9)

    def gpu(self, major: int, minor: int = 0) -> Machine:
        patch, torchs = self.patch, torch.backends
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (major, minor))
        patch.setattr(torchs.cuda, "is_flash_attention_available", lambda: True)
        patch.setattr(torchs.cudnn, "is_available", lambda: True)
        patch.setattr(torchs.cudnn, "version", lambda: 92400)
        return self

    def activate(self, impl: str | None) -> None:
        self.patch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: impl)

    def install(self, *packages: str) -> Machine:
        for package in packages:
            getattr(self, "_" + package.partition(" ")[0])(package.partition(" ")[2])
        return self

    def _put(self, modules: dict[str, ModuleType]) -> None:
        for name, module in modules.items():
            self.patch.setitem(sys.modules, name, module)

    def _fa2(self, version: str) -> None:
        self._put(fake_flash_attn.release(version))
        self.modules["flash_attn"] = SimpleNamespace(origin="flash_attn/__init__.py")
        self.versions["flash-attn"] = version

    def _fa3(self, namespace: str) -> None:
        found = fake_fa3.operators(namespace or "flash_attn_3")
        self.modules["flash_attn_interface"] = True
        self.patch.setattr("hf_usp.kernels.packages.import_flash_attn_3", lambda: found)

    def _fa4(self, version: str) -> None:
        """The files may be of another release than the one that pip knows: "4.0.0b36 files 2.8.3"."""
        version, _, files = version.partition(" files ")
        modules = fake_fa4.release(files or version)
        if "flash_attn" in self.modules:
            del modules["flash_attn"]  # that of flash-attn, which has the file
        self._put(modules)
        self.modules.setdefault("flash_attn", SimpleNamespace(origin=None))
        self.versions["flash-attn-4"] = version
        older = hf_usp.compat.Version
        self.patch.setattr(
            "hf_usp.kernels.packages.is_older", lambda package, oldest: older(self.versions[package]) < older(oldest)
        )

    def _kernels(self, state: str) -> None:
        """The package `kernels` with the Hub's kernels "loaded", "cached", or neither."""
        module = fake_fa3.hub() if state == "loaded" else ModuleType("kernels")
        if state != "loaded":
            module.asked = []  # type: ignore[attr-defined]

            def install_kernel(repository: str, version: int, local_files_only: bool) -> None:
                if state != "cached":
                    raise FileNotFoundError(f"no snapshot of {repository}")

            def get_kernel(repository: str, version: int) -> SimpleNamespace:
                module.asked.append((repository, version))  # type: ignore[attr-defined]
                interface = fake_flash_attn.release("2.8.3")["flash_attn.flash_attn_interface"]
                return SimpleNamespace(ops=fake_fa3.operators("flash_attn_3"), flash_attn_interface=interface)

            module.get_loaded_kernels = list  # type: ignore[attr-defined]
            module.install_kernel, module.get_kernel = install_kernel, get_kernel  # type: ignore[attr-defined]
        self._put({"kernels": module})
        self.modules["kernels"] = True


@pytest.fixture
def machine(monkeypatch: Patch) -> Machine:
    return Machine(monkeypatch)


def chosen(dtype: torch.dtype = BF16, width: int = 128, softmax: Softmax = SOFTMAX, value: int | None = None) -> str:
    return choose_kernel(GPU, dtype, width, softmax, value_dim=value).name


def reason(name: str, dtype: torch.dtype = BF16, width: int = 128, value: int | None = None, **how: object) -> str:
    why_not = KERNELS[name].why_not(Request(GPU, dtype, width, value or width, SOFTMAX, **how))  # type: ignore[arg-type]
    assert why_not is not None
    return why_not


ALL = ("fa2 2.8.3", "fa3", "fa4 4.0.0b36")


@slow
@pytest.mark.parametrize(
    ("major", "packages", "expected"),
    [
        # bf16, float32, softcap, width 256, width 512, DeepSeek's 192 and 128
        (7, (), ("efficient", "efficient", "blockwise", "efficient", "efficient", "efficient")),
        (8, (), ("cuda_flash", "efficient", "blockwise", "cuda_flash", "efficient", "cuda_flash")),
        (8, ALL, ("flash_attn", "efficient", "flash_attn", "flash_attn", "efficient", "flash_attn")),
        (9, (), ("cudnn", "efficient", "blockwise", "cudnn", "efficient", "cudnn")),
        (9, ALL, ("fa3", "efficient", "fa3", "fa3", "efficient", "fa3")),
        (9, ("fa4 4.0.0b36",), ("cudnn", "efficient", "fa4", "cudnn", "efficient", "cudnn")),
        (10, (), ("cudnn", "efficient", "blockwise", "cuda_flash", "efficient", "cudnn")),
        (10, ALL, ("fa4", "efficient", "fa4", "flash_attn", "efficient", "fa4")),
        (12, ALL, ("flash_attn", "efficient", "flash_attn", "flash_attn", "efficient", "flash_attn")),
    ],
)
def test_order_of_preference(
    machine: Machine, major: int, packages: tuple[str, ...], expected: tuple[str, ...]
) -> None:
    """Whatever is trained in bf16, fp16 or float32 is computed without a matrix of scores, so never by `eager`."""
    machine.gpu(major).install(*packages)
    dtype = BF16 if major > 7 else torch.float16
    found = (
        chosen(dtype),
        chosen(FP32),
        chosen(dtype, softmax=CAPPED),
        chosen(dtype, 256),
        chosen(dtype, 512),
        chosen(dtype, 192, value=128),
    )
    assert found == expected


@pytest.mark.parametrize(
    ("dtype", "softmax", "name"),
    [(torch.float64, SOFTMAX, "cpu_flash"), (BF16, SOFTMAX, "cpu_flash"), (FP32, CAPPED, "blockwise")],
)
def test_on_cpu(dtype: torch.dtype, softmax: Softmax, name: str) -> None:
    assert choose_kernel(CPU, dtype, 64, softmax).name == name


@pytest.mark.parametrize(
    ("major", "widths", "name"),
    [
        (9, (136, 136), "fa4"),
        (9, (248, 248), "fa4"),
        (10, (128, 128), "fa4"),
        (10, (192, 128), "fa4"),
        (10, (136, 72), "fa4"),
        (10, (136, 136), None),
        (10, (248, 248), None),
        (10, (256, 256), None),
        (10, (192, 192), None),
    ],
)
def test_widths_of_fa4(machine: Machine, major: int, widths: tuple[int, int], name: str | None) -> None:
    """On Blackwell it has kernels for few: others are padded to one of those, or left to other kernels."""
    machine.gpu(major).install("fa4 4.0.0b36")
    if name is None:
        text = f"takes no heads of width {widths[0]} on this device"
        assert text in reason("fa4", width=widths[0], value=widths[1])
    else:
        assert choose_kernel(GPU, BF16, widths[0], SOFTMAX, name, widths[1]).name == name


@pytest.mark.parametrize(
    ("packages", "said"),
    [
        (("fa4 4.0.0b18",), "4.0.0b18 is installed, 4.0.0b30 and newer are supported: pip install --pre flash-attn-4"),
        (("fa2 2.8.3",), "FlashAttention 4 is not installed: pip install --pre flash-attn-4"),
        (
            ("fa2 2.8.3", "fa4 4.0.0b36 files 2.8.3"),
            "flash-attn 2.8.3 put an old flash_attn/cute over that of flash-attn-4 4.0.0b36: "
            "pip install --pre flash-attn-4 --force-reinstall --no-deps",
        ),
    ],
)
def test_releases_of_fa4(machine: Machine, packages: tuple[str, ...], said: str) -> None:
    machine.install(*packages)
    assert said in reason("fa4")
    with pytest.raises(UspKernelError, match="kernel='fa4'") as refusal:
        check_installed("fa4", GPU)  # with the batch, on every rank
    assert said in str(refusal.value)


@pytest.mark.parametrize("version", ["2.6.3", "3.0.0b1"])
def test_releases_of_fa2(machine: Machine, version: str) -> None:
    machine.install(f"fa2 {version}")
    assert f"flash-attn {version} is installed, versions 2.7 and 2.8" in reason("flash_attn")


def test_a_build_for_another_torch_is_a_reason_not_a_crash(machine: Machine, monkeypatch: Patch) -> None:
    machine.install("fa2 2.8.3")
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", None)  # its import raises ImportError
    assert "does not import" in reason("flash_attn") and "pip install flash-attn" in reason("flash_attn")
    with pytest.raises(UspKernelError, match="does not import"):
        check_installed("flash_attn", GPU)


def test_fa4_alone_is_no_flash_attn_2(machine: Machine) -> None:
    """It leaves a folder `flash_attn` without a file of its own."""
    machine.install("fa4 4.0.0b36")
    assert (
        reason("flash_attn") == "the package flash-attn is not installed: pip install flash-attn --no-build-isolation"
    )


def test_an_operator_of_another_interface(machine: Machine, monkeypatch: Patch) -> None:
    library = torch.library.Library("flash_attn_3_other", "DEF")
    library.define("fwd(Tensor q, Tensor k, Tensor v, bool causal=False) -> Tensor")
    library.define("bwd(Tensor q) -> Tensor")
    machine.install("fa3")
    other = torch.ops.flash_attn_3_other
    monkeypatch.setattr("hf_usp.kernels.packages.import_flash_attn_3", lambda: other)
    assert "flash-attn-3 is installed, but does not take cu_seqlens_k, cu_seqlens_q, is_causal" in reason("fa3")


# Kernels of the Hub.


def test_a_kernel_of_the_hub_that_is_loaded_or_cached_is_used(machine: Machine) -> None:
    assert "pip install kernels" in reason("fa3")
    machine.install("kernels loaded")
    assert chosen() == "fa3"
    machine.install("kernels cached")
    assert chosen() == "fa3" and sys.modules["kernels"].asked == [("kernels-community/flash-attn3", 1)]
    machine.gpu(8)
    assert chosen(softmax=CAPPED) == "flash_attn"
    assert sys.modules["kernels"].asked[1:] == [("kernels-community/flash-attn2", 4)]


def test_a_kernel_of_the_hub_is_downloaded_where_it_is_named_alone(machine: Machine) -> None:
    machine.install("kernels")
    assert chosen() == "cudnn" and "no snapshot of kernels-community/flash-attn3" in reason("fa3")
    assert sys.modules["kernels"].asked == []
    assert choose_kernel(GPU, BF16, 128, SOFTMAX, "fa3").name == "fa3"
    assert sys.modules["kernels"].asked == [("kernels-community/flash-attn3", 1)]


# The implementation that torch was told to use.


def test_an_active_implementation_comes_first(machine: Machine) -> None:
    machine.install(*ALL)
    machine.activate("FA3")
    assert chosen() == "cuda_flash" and chosen(FP32) == "efficient"
    assert kernel_report(Request(GPU, BF16, 128, 128, SOFTMAX))[0].name == "cuda_flash (torch's FA3)"
    assert chosen(softmax=CAPPED) == "fa3", "torch's operator has no softcap, the package has"
    machine.activate(None)
    assert chosen() == "fa3"


@pytest.mark.parametrize(
    ("impl", "major", "packages", "said"),
    [
        ("FA3", 8, ALL, r"torch's FA3 needs compute capability 9\.0 \(Hopper\), this device has 8\.0"),
        ("FA3", 10, ALL, r"this device has 10\.0"),
        ("FA4", 12, ALL, r"needs compute capability 9\.0 \(Hopper\) or 10\.0 \(Blackwell\), this device has 12\.0"),
        ("FA4", 9, ("fa4 4.0.0b18",), r"torch>=2\.14|4\.0\.0b30 and newer"),
        ("FA5", 9, ALL, "replaced by 'FA5', whose rules hf_usp does not know"),
    ],
)
def test_an_activation_that_torch_would_refuse(
    machine: Machine, impl: str, major: int, packages: tuple[str, ...], said: str
) -> None:
    """Refused with the batch, on every rank, and again where a kernel is chosen; not replaced."""
    machine.gpu(major).install(*packages)
    machine.activate(impl)
    for step in (lambda: check_installed(None, GPU), chosen):
        with pytest.raises(UspKernelError, match=said) as refusal:
            step()
        assert impl in str(refusal.value) and "restore_flash_attention_impl()" in str(refusal.value)
    machine.activate(None)
    check_installed(None, GPU)


def test_torchs_fa4_needs_a_torch_that_knows_its_results(machine: Machine, monkeypatch: Patch) -> None:
    machine.install("fa4 4.0.0b36")
    machine.activate("FA4")
    for old in (True, False):
        monkeypatch.setattr("hf_usp.kernels.dialects.is_older", lambda package, oldest, old=old: old)
        why_not = KERNELS["cuda_flash"].why_not(Request(GPU, BF16, 128, 128, SOFTMAX))
        assert (why_not is not None and "pip install 'torch>=2.14'" in why_not) == old


# Determinism.


def test_deterministic_backwards(machine: Machine) -> None:
    """FA3 up to width 192; cuDNN has none."""
    machine.install("fa3")
    torch.use_deterministic_algorithms(True)
    try:
        assert chosen() == "fa3" and chosen(width=192) == "fa3"
        assert chosen(width=200) == "cuda_flash"
        assert "no deterministic backward for heads wider than 192" in reason("fa3", width=200)
        assert "deterministic" in reason("cudnn")
    finally:
        torch.use_deterministic_algorithms(False)


# Named kernels.


@pytest.mark.parametrize(
    ("name", "device", "dtype", "width", "softmax", "said"),
    [
        ("cuda_flash", CPU, BF16, 64, SOFTMAX, "tensors are on cpu"),
        ("cuda_flash", GPU, FP32, 64, SOFTMAX, "not in torch.float32"),
        ("cuda_flash", GPU, BF16, 264, SOFTMAX, "at most 256, not 264"),
        ("cuda_flash", GPU, BF16, 64, CAPPED, "no softcap"),
        ("cudnn", GPU, FP32, 64, SOFTMAX, "not in torch.float32"),
        ("cudnn", GPU, BF16, 264, SOFTMAX, "at most 256, not 264"),
        ("cudnn", GPU, BF16, 64, CAPPED, "no softcap"),
        ("cudnn", CPU, BF16, 64, SOFTMAX, "tensors are on cpu"),
        ("efficient", GPU, FP32, 64, CAPPED, "no softcap"),
        ("efficient", GPU, torch.float64, 64, SOFTMAX, "does not compute in torch.float64"),
        ("fa3", GPU, BF16, 264, SOFTMAX, "at most 256, not 264"),
        ("fa4", CPU, BF16, 64, SOFTMAX, "tensors are on cpu"),
        ("cpu_flash", GPU, FP32, 64, SOFTMAX, "tensors are on cuda"),
        ("cpu_flash", CPU, FP32, 64, CAPPED, "no softcap"),
        ("flash4", CPU, FP32, 64, SOFTMAX, "one of flash_attn, cuda_flash, fa3, fa4, cudnn, efficient, cpu_flash, b"),
    ],
)
def test_a_named_kernel_is_used_or_refused(
    name: str, device: torch.device, dtype: torch.dtype, width: int, softmax: Softmax, said: str
) -> None:
    with pytest.raises(UspKernelError, match=said) as refusal:
        choose_kernel(device, dtype, width, softmax, name)
    assert f"kernel={name!r}" in str(refusal.value) and "Remedy:" in str(refusal.value)


@pytest.mark.parametrize(
    ("change", "name", "said"),
    [
        (lambda m: m.gpu(7, 5), "flash_attn", "compute capability 8.0 (Ampere) or newer, this device has 7.5"),
        (lambda m: m.gpu(8), "fa3", "compute capability 9.0 (Hopper), this device has 8.0"),
        (lambda m: m.gpu(10), "fa3", "this device has 10.0"),
        (lambda m: m.patch.setattr(torch.backends.cudnn, "version", lambda: 8900), "cudnn", "no cuDNN 9"),
        (lambda m: m.patch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: False), "cudnn", "was called"),
        (
            lambda m: m.patch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False),
            "cuda_flash",
            "built without FlashAttention",
        ),
        (
            lambda m: m.patch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False),
            "cudnn",
            "nothing computes its other segments (flash_attn: the package flash-attn is not installed",
        ),
        (lambda m: m.patch.setattr(torch.cuda, "is_available", lambda: False), "fa4", "finds no CUDA device"),
        (lambda m: m.patch.setattr(torch.version, "hip", "7.0"), "efficient", "not checked on ROCm"),
    ],
)
def test_what_a_device_or_a_build_lacks(
    machine: Machine, change: Callable[[Machine], object], name: str, said: str
) -> None:
    change(machine)
    assert said in reason(name)


def test_cudnn_on_other_devices(machine: Machine) -> None:
    machine.gpu(8)
    assert "no backward for heads of width 192 (values 128) on compute capability 8.0" in reason(
        "cudnn", width=192, value=128
    )
    assert KERNELS["cudnn"].why_not(Request(GPU, BF16, 128, 128, SOFTMAX)) is None


def test_a_kernel_that_no_dtype_can_use_here(machine: Machine) -> None:
    check_installed(None, GPU)
    for name in ("eager", "blockwise", "efficient", "cudnn"):
        check_installed(name, GPU)
    check_installed("cpu_flash", CPU)
    for name in ("flash_attn", "fa3", "fa4", "flash4"):
        with pytest.raises(UspKernelError, match=f"kernel='{name}'"):
            check_installed(name, GPU)


# Slow kernels and large scores.


def test_a_slow_kernel_on_a_gpu_is_not_taken_in_silence(machine: Machine) -> None:
    with pytest.warns(
        UserWarning, match=r"no flash attention for torch\.bfloat16 .*'blockwise'.*flash-attn is not inst"
    ):
        assert chosen(softmax=CAPPED) == "blockwise"


def test_eager_is_refused_beyond_a_size() -> None:
    check_scores(KERNELS["eager"], 32, 4096, 32_768, BF16)
    check_scores(KERNELS["blockwise"], 32, 1 << 20, 1 << 20, BF16)
    with pytest.raises(UspKernelError, match=r"32 heads and 131,072 keys: 16 GiB of scores .*'blockwise'"):
        check_scores(KERNELS["eager"], 32, 1 << 20, 131_072, BF16)
    check_scores(KERNELS["eager"], 32, 8, 131_072, BF16)


@pytest.mark.parametrize("documents", [1, 4])
def test_a_layer_that_eager_cannot_keep(documents: int, monkeypatch: Patch) -> None:
    """The longest document decides, on every rank alike."""
    batch = {
        "input_ids": torch.zeros(1, 64, dtype=torch.int64),
        "position_ids": torch.arange(64)[None] % (64 // documents),
    }
    layout = hf_usp.shard(batch, hf_usp.UspMesh.build(ring_degree=1, ulysses_degree=1), kernel="eager")["usp"]
    q = torch.randn(1, 64, 2, 8)
    monkeypatch.setattr("hf_usp.kernels.registry.MOST_SCORES", 2 * 64 * 16 * 4)
    if documents == 4:
        hf_usp.usp_attention(q, q, q, layout)
    else:
        with pytest.raises(UspKernelError, match=r"kernel='eager' for 2 heads and 64 keys"):
            hf_usp.usp_attention(q, q, q, layout)


# Reports.


def test_what_would_be_faster_and_how_to_install_it(machine: Machine) -> None:
    """Packages before the chosen kernel that are missing; not what this device cannot use."""
    lines = choice_lines(kernel_report(Request(GPU, BF16, 128, 128, SOFTMAX)))
    assert lines[0] == "cudnn" and len(lines) == 2
    assert lines[1].startswith("not fa3, which would be faster: FlashAttention 3 is not installed: pip install kernels")
    lines = choice_lines(kernel_report(Request(GPU, BF16, 128, 128, CAPPED)))
    assert lines[0] == "blockwise" and [line.split(":")[0] for line in lines[1:]] == [
        "not fa3, which would be faster",
        "not cudnn",
        "not fa4, which would be faster",
        "not flash_attn, which would be faster",
        "not cuda_flash",
        "not efficient",
    ]
    machine.gpu(12).install("fa2 2.8.3")
    assert choice_lines(kernel_report(Request(GPU, BF16, 128, 128, SOFTMAX))) == [
        "flash_attn, the first choice on this device"
    ]


def logged() -> list[str]:
    """Log lines of a rank about kernels in two forwards."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("hf_usp.models.hooks")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    model = tiny_model("llama")
    mesh = hf_usp.UspMesh.build(ring_degree=2, ulysses_degree=1)
    hf_usp.apply_context_parallel(model, mesh, self_check=False)
    with torch.no_grad():
        for _ in range(2):
            model(input_ids=torch.ones(1, 16, dtype=torch.int64))
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)
    return lines


def test_the_log_of_a_model(two_ranks: Ranks) -> None:
    """Once, on the first rank: which kernel computes which calls."""
    line = "usp: attention in torch.float32, heads of width 8: cpu_flash, the first choice on this device"
    assert two_ranks.run(logged) == [[line], []]


def test_report_gives_a_reason_for_every_kernel_that_cannot() -> None:
    choices = kernel_report(Request(CPU, BF16, 64, 64, SOFTMAX))
    reasons = {choice.name: choice.why_not for choice in choices}
    assert [choice.name for choice in choices[:3]] == ["cpu_flash", "blockwise", "eager"]
    assert set(reasons) == set(KERNELS)
    assert reasons["cuda_flash"] == "it computes on CUDA devices, the tensors are on cpu"
    assert reasons["cpu_flash"] is None and reasons["eager"] is None


def test_import_touches_neither_the_packages_nor_cuda() -> None:
    program = (
        "import sys, torch, hf_usp.kernels as k\n"
        "clean = lambda: not {'flash_attn', 'kernels'} & set(sys.modules) and not torch.cuda.is_initialized()\n"
        "assert clean()\n"
        "k.kernel_report(k.Request(torch.device('cpu'), torch.bfloat16, 64, 64, k.Softmax(0.1)))\n"
        "assert clean()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
