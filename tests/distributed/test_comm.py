"""Which device small messages travel from, and when a new group is connected, by what its backends are."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch

from hf_usp.distributed import comm, mesh

GROUP: Any = object()


@pytest.mark.parametrize(
    ("backends", "device", "connected"),
    [
        ("cpu:gloo,cuda:gloo", "cpu", False),  # "gloo"
        ("cuda:nccl", "cuda", True),  # "nccl"
        ("cpu:gloo,cuda:nccl", "cpu", True),  # without a name, and what Accelerate takes for FSDP with offload
        ("cpu:gloo", "cpu", False),
    ],
)
def test_backends_of_a_group(monkeypatch: pytest.MonkeyPatch, backends: str, device: str, connected: bool) -> None:
    """On a machine with a GPU: NCCL makes its communicator in a first call of all ranks."""
    calls = []
    monkeypatch.setattr(comm.dist, "get_backend_config", lambda group: backends)
    monkeypatch.setattr(comm.dist, "all_reduce", lambda tensor, group: calls.append(group))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch, "zeros", lambda *size, device: device)
    assert comm.group_device(GROUP).type == device
    comm.init_communicator(GROUP)
    assert calls == ([GROUP] if connected else [])


@pytest.mark.parametrize(("backends", "has"), [("cuda:nccl", True), ("cpu:gloo,cuda:nccl", True), ("cpu:gloo", False)])
def test_a_ring_comes_before_tiles_where_nccl_can(monkeypatch: pytest.MonkeyPatch, backends: str, has: bool) -> None:
    class Nccl:
        class Options:
            def __init__(self, is_high_priority_stream: bool) -> None:
                self.is_high_priority_stream = is_high_priority_stream

    monkeypatch.setattr(comm.dist, "get_backend_config", lambda group: backends)
    monkeypatch.setattr(comm.dist, "ProcessGroupNCCL", Nccl, raising=False)
    made: list[tuple[object, object]] = []
    monkeypatch.setattr(mesh, "_default_group", lambda: GROUP)
    monkeypatch.setattr(mesh, "group_timeout", lambda group: timedelta(minutes=1))
    monkeypatch.setattr(mesh.dist, "new_group", lambda ranks, **options: options)
    monkeypatch.setattr(mesh, "set_group_timeout", lambda group, timeout: made.append((group["timeout"], timeout)))
    monkeypatch.setattr(mesh, "init_communicator", lambda group: None)
    for beside_tiles in (True, False):
        options = mesh._new_group([0, 1], beside_tiles)["pg_options"]  # type: ignore[index]
        assert (options is not None) == (has and beside_tiles)
        assert options is None or options.is_high_priority_stream
    assert made == ([(None, timedelta(minutes=1))] if has else []), (
        "the timeout of the process group is the ring's, too"
    )
