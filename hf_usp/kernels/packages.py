"""FlashAttention 2, 3 and 4 where they are installed: their two functions, or why they cannot be used.

A package is imported when a call is to be computed on a CUDA device, never before. FlashAttention 2 and 3 are also
kernels of the Hub (package `kernels`): one that is in the Hub's cache is used, one that a user names is downloaded.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..compat import (
    FLASH_ATTN,
    flash_attn_functions,
    hub_kernel,
    import_flash_attn,
    import_flash_attn_3,
    import_flash_attn_4,
    installed_version,
    is_older,
    operator_arguments,
)

INSTALL = "pip install flash-attn --no-build-isolation"
INSTALL_4 = "pip install --pre flash-attn-4"
FA4_OLDEST = "4.0.0b30"  # its window rule; releases before b28 count a pair whose sum is negative as no limit
# Keywords that hf_usp passes: a function without one of them is another interface.
COMMON = "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k softmax_scale window_size_left window_size_right"
GRADIENTS = f"{COMMON} softcap dout out dq dk dv deterministic"


class Functions(NamedTuple):
    """The two functions of a package.

    Attributes:
        forward: of a variable-length call.
        backward: of the same call.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]


def flash_attn_2(download: bool) -> Functions | str:
    """The package flash-attn, versions 2.7 and 2.8, else the kernel of the Hub."""
    if not _has_flash_attn_2():
        found = _from_hub("flash-attn2", 4, download)
        if isinstance(found, str):
            return f"the package flash-attn is not installed{found}: {INSTALL}"
        forward, backward = flash_attn_functions(found.flash_attn_interface)
        return _checked("kernels-community/flash-attn2", forward, backward, "causal", INSTALL)
    try:
        version, forward, backward = import_flash_attn()
    except (ImportError, OSError, RuntimeError, AttributeError) as error:  # a build for another torch fails here
        return (
            f"flash-attn is installed but does not import ({error}): "
            f"build it for this torch with {INSTALL} --force-reinstall --no-deps"
        )
    if not FLASH_ATTN[0] <= tuple(int(part) for part in version.split(".")[:2]) < FLASH_ATTN[1]:
        return f"flash-attn {version} is installed, versions 2.7 and 2.8 are supported: {INSTALL}"
    return _checked(f"flash-attn {version}", forward, backward, "causal", INSTALL)


def flash_attn_3(download: bool) -> Functions | str:
    """FlashAttention 3: the operators of its package, else those of the kernel of the Hub."""
    install = (
        "pip install kernels, and kernel='fa3' downloads kernels-community/flash-attn3; or pip install flash-attn-3 "
        f"--index-url https://download.pytorch.org/whl/cu{(torch.version.cuda or '130').replace('.', '')}"
    )
    if _spec("flash_attn_interface") is None:
        found = _from_hub("flash-attn3", 1, download)
        if isinstance(found, str):
            return f"FlashAttention 3 is not installed{found}: {install}"
        operators, name = found.ops, "kernels-community/flash-attn3"
    else:
        try:
            operators, name = import_flash_attn_3(), "flash-attn-3"
        except (ImportError, OSError, RuntimeError, AttributeError) as error:
            return f"flash-attn-3 is installed but does not import ({error}): {install}"
    forward, backward = (_operator(getattr(operators, way, None)) for way in ("fwd", "bwd"))
    return _checked(name, forward, backward, "is_causal", install)


def flash_attn_4(download: bool) -> Functions | str:
    """FlashAttention 4, a package of its own, which shares a folder with flash-attn."""
    version = installed_version("flash-attn-4")
    if version is None:
        return f"FlashAttention 4 is not installed: {INSTALL_4}"
    if is_older("flash-attn-4", FA4_OLDEST):
        return f"flash-attn-4 {version} is installed, {FA4_OLDEST} and newer are supported: {INSTALL_4} --upgrade"
    again = f"{INSTALL_4} --force-reinstall --no-deps"
    try:
        forward, backward = import_flash_attn_4()
    except Exception as error:  # its compiler refuses drivers and devices by errors of its own
        return f"flash-attn-4 {version} is installed but does not import ({type(error).__name__}: {error}): {again}"
    found = _checked(f"flash-attn-4 {version}", forward, backward, "causal", again)
    if isinstance(found, str) and (other := installed_version("flash-attn")) is not None:
        return f"flash-attn {other} put an old flash_attn/cute over that of flash-attn-4 {version}: {again}"
    return found


def _has_flash_attn_2() -> bool:
    """FlashAttention 4 alone leaves a folder `flash_attn` without a file of its own: no origin."""
    spec = _spec("flash_attn")
    return spec is not None and spec.origin is not None


def _spec(name: str) -> Any:
    try:
        return importlib.util.find_spec(name)
    except ValueError:  # a module that was put into sys.modules without a spec
        return None


def _from_hub(name: str, version: int, download: bool) -> Any:
    """A kernel of the Hub, or the end of the sentence that says why there is none."""
    if _spec("kernels") is None:
        return ""
    try:
        return hub_kernel(f"kernels-community/{name}", version, download)
    except Exception as error:  # network, builds, versions: all are reasons to take another kernel
        return f", nor kernels-community/{name} to be had by the package kernels ({type(error).__name__}: {error})"


def _operator(operator: Any) -> Callable[..., Any] | None:
    """An operator as a function of keywords; older schemas have no defaults for what may be None."""
    if operator is None:
        return None
    missing = {name: None for name, has_default in operator_arguments(operator) if not has_default}

    def call(**given: Any) -> Any:
        return operator(**missing | given)

    call.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name, _ in operator_arguments(operator)]
    )
    return call


def _checked(name: str, forward: Any, backward: Any, causal: str, install: str) -> Functions | str:
    """The functions, if they take what hf_usp passes."""
    for function, keywords in ((forward, COMMON), (backward, GRADIENTS)):
        if function is None:
            return f"{name} is installed without the functions that hf_usp calls: {install}"
        takes = inspect.signature(function).parameters
        anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values())  # a registered operator
        lacking = {*keywords.split(), causal} - takes.keys()
        if lacking and not anything:
            return f"{name} is installed, but does not take {', '.join(sorted(lacking))}: {install}"
    return Functions(forward, backward)
