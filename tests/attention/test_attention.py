"""The core against one dense fp64 oracle: outputs and all gradients, over meshes, orders, masks and head counts."""

from __future__ import annotations

import itertools
import os
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hf_usp.sharding.load_balance import ALL_ORDERS

from ..oracle import dense_attention
from ..ranks import Ranks

MESHES = [(4, 1), (2, 2), (1, 4), (1, 2), (2, 1)]  # ring x ulysses
HEADS = [(4, 2, 16, 16), (14, 2, 16, 16), (7, 1, 16, 24), (2, 1, 16, 16), (9, 3, 24, 16)]  # query, kv, widths
BATCHES = {"batched": (3, 16), "one_row": (1, 37)}


def allowed_pairs(positions: Tensor | None, length: int, window: int | None, causal: bool) -> Tensor:
    """Dense mask [S, S] of one row, written from the definition."""
    i = torch.arange(length)
    distance = i[:, None] - i
    allowed = torch.ones(length, length, dtype=torch.bool)
    if causal:
        allowed &= distance >= 0
    if window is not None:
        allowed &= distance.abs() < window
    if positions is not None:
        document = (positions.diff(prepend=positions[:1] - 1) != 1).cumsum(0)
        allowed &= document[:, None] == document
    return allowed


def core_errors(mesh_degrees: tuple[int, int], sabotage: str = "") -> dict[str, float]:
    """Case -> largest error of out, dq, dk, dv and dsinks, over the cases of one mesh, in fp64."""
    import hf_usp
    from hf_usp.batch.documents import find_documents
    from hf_usp.batch.layout import make_layout
    from hf_usp.batch.shard import shard_tensor

    mesh = hf_usp.UspMesh.build(ring_degree=mesh_degrees[0], ulysses_degree=mesh_degrees[1])
    errors = {}
    cases = itertools.product(
        ALL_ORDERS, HEADS, BATCHES.values(), (False, True), (None, 5), (True, False), (False, True)
    )
    for number, (order, heads, (rows, length), packed, window, causal, sink) in enumerate(cases):
        if number % (7 if sabotage else 5):
            continue  # a fifth of the product; coprime steps reach every value of every factor
        torch.manual_seed(number)
        query, kv, width, value_width = heads
        shapes = ((query, width), (kv, width), (kv, value_width), (query, value_width))
        q, k, v, dout = (torch.randn(rows, length, h, w, dtype=torch.float64) for h, w in shapes)
        sinks = torch.randn(query, dtype=torch.float64) if sink else None
        positions = torch.cat([torch.arange(n) for n in (5, 1, 3, length - 9)]) if packed else None
        full = [x.clone().requires_grad_() for x in (q, k, v)]
        full_sinks = None if sinks is None else sinks.clone().requires_grad_()
        allowed = allowed_pairs(positions, length, window, causal)
        expected = dense_attention(*full, allowed, scale=width**-0.5, sinks=full_sinks)
        expected.backward(dout)

        given = None if positions is None or sabotage == "documents" else positions[None].expand(rows, -1)
        layout = make_layout(find_documents(rows, length, None, given), rows, length, mesh, order)
        mine = [shard_tensor(x, layout).clone().requires_grad_() for x in (q, k, v)]
        my_sinks = None if sinks is None else sinks.clone().requires_grad_()
        seen = window + 1 if window and sabotage == "window" else window
        out = hf_usp.usp_attention(*mine, layout, sliding_window=seen, causal=causal, sinks=my_sinks)
        out.backward(shard_tensor(dout, layout))
        if sabotage == "dk":
            mine[1].grad *= 1.001
        pairs = [(out.detach(), expected.detach()), *((a.grad, b.grad) for a, b in zip(mine, full, strict=True))]
        found = [(hf_usp.unshard(a, layout) - b).abs().max().item() for a, b in pairs]
        if sinks is not None:
            dist.all_reduce(my_sinks.grad, group=mesh.group)
            found.append((my_sinks.grad - full_sinks.grad).abs().max().item())
        flags = f"packed {packed}, window {window}, causal {causal}, sinks {sink}"
        errors[f"{order}, heads {heads}, {rows} x {length}, {flags}"] = max(found)
    return errors


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_outputs_and_gradients_equal_the_oracle(four_ranks: Ranks, mesh: tuple[int, int]) -> None:
    for errors in four_ranks.run(core_errors, mesh):
        assert len(errors) > 90 and not {case: error for case, error in errors.items() if not error < 1e-10}


def error_across_nodes() -> tuple[list[int], float]:
    """Ring ranks on a node as the mesh finds them, and the largest error of a ring over two nodes of two ranks."""
    import hf_usp

    found = []
    for sizes in ("2222", "4444", "2444", "3333"):
        with patch.dict(os.environ, LOCAL_WORLD_SIZE=sizes[dist.get_rank()]):
            for ring, ulysses in ((4, 1), (2, 2)):
                found.append(hf_usp.UspMesh.build(ring_degree=ring, ulysses_degree=ulysses).ring_per_node)
    positions = torch.cat([torch.arange(n) for n in (50, 3, 43)])[None]
    batch = {"input_ids": torch.zeros(1, 96, dtype=torch.long), "position_ids": positions}
    results, sources = [], []
    for size in ("4", "2"):
        with patch.dict(os.environ, LOCAL_WORLD_SIZE=size):
            layout = hf_usp.shard(batch, hf_usp.UspMesh.build(ring_degree=4, ulysses_degree=1), order="zigzag")["usp"]
        torch.manual_seed(dist.get_rank())
        inputs = [torch.randn(1, 24, h, 16, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2)]
        out = hf_usp.usp_attention(*inputs, layout)
        out.square().sum().backward()
        results.append([out, *(x.grad for x in inputs)])
        sources.append([step.recv_rank ^ dist.get_rank() for step in layout.ring_schedule().steps])
    assert sources[1] == [0, 2, 3, 1] != sources[0]
    return found, max((a - b).abs().max().item() for a, b in zip(*results, strict=True))


def test_a_ring_over_nodes_sends_across_them_first(four_ranks: Ranks) -> None:
    """Sizes that ranks do not agree on, and nodes that hold different numbers of them, leave the plain order."""
    for found, error in four_ranks.run(error_across_nodes):
        assert found == [2, 1, 4, 2, 1, 1, 1, 1] and error < 1e-12


@pytest.mark.parametrize("sabotage", ["documents", "window", "dk"])
def test_the_comparison_has_teeth(four_ranks: Ranks, sabotage: str) -> None:
    """Documents ignored, a window off by one, dk off by 0.1 %: each must be seen."""
    for errors in four_ranks.run(core_errors, (2, 2), sabotage):
        assert max(errors.values()) > 1e-4


def one_process_error() -> float:
    import hf_usp

    q, k, v = (torch.randn(2, 19, h, 16, dtype=torch.float64) for h in (4, 2, 2))
    layout = hf_usp.shard(
        {"input_ids": torch.zeros(2, 19, dtype=torch.long)}, hf_usp.UspMesh.build(ring_degree=1, ulysses_degree=1)
    )["usp"]
    out = hf_usp.usp_attention(q, k, v, layout, softcap=3.0, scaling=0.7)
    return (
        (out - dense_attention(q, k, v, allowed_pairs(None, 19, None, True), scale=0.7, softcap=3.0)).abs().max().item()
    )


def test_one_process_needs_no_group() -> None:
    assert one_process_error() < 1e-12


def low_precision(dtype: torch.dtype) -> list[tuple[float, float]]:
    """(error of the sharded core, error of one process) against fp64, for out, dq, dk, dv."""
    import hf_usp
    from hf_usp.batch.documents import find_documents
    from hf_usp.batch.layout import make_layout
    from hf_usp.batch.shard import shard_tensor

    torch.manual_seed(0)
    rows, length, width = 1, 256, 32
    q, k, v, dout = (torch.randn(rows, length, h, width).to(dtype) for h in (4, 2, 2, 4))
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    expected = dense_attention(*exact, allowed_pairs(None, length, None, True), scale=width**-0.5)
    expected.backward(dout.double())
    results = []
    for ring in (4, 1):
        mesh = hf_usp.UspMesh.build(ring_degree=ring, ulysses_degree=1)
        layout = make_layout(find_documents(rows, length, None, None), rows, length, mesh, "auto")
        mine = [shard_tensor(x, layout).clone().requires_grad_() for x in (q, k, v)]
        out = hf_usp.usp_attention(*mine, layout)
        out.backward(shard_tensor(dout, layout))
        pairs = [(out.detach(), expected.detach()), *((a.grad, b.grad) for a, b in zip(mine, exact, strict=True))]
        results.append([((hf_usp.unshard(a, layout).double() - b).norm() / b.norm()).item() for a, b in pairs])
    return list(zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_low_precision_errs_little_more_than_one_process(four_ranks: Ranks, dtype: torch.dtype) -> None:
    for sharded, alone in four_ranks.run(low_precision, dtype)[0]:
        assert sharded < 1.25 * alone + 1e-9


def bitwise_ulysses() -> bool:
    """A pure-ulysses forward against the same kernel in one process."""
    import hf_usp
    from hf_usp.batch.documents import find_documents
    from hf_usp.batch.layout import make_layout
    from hf_usp.batch.shard import shard_tensor

    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 64, h, 16).to(torch.bfloat16) for h in (8, 4, 4))
    outs = []
    for ulysses in (4, 1):
        mesh = hf_usp.UspMesh.build(ring_degree=1, ulysses_degree=ulysses)
        layout = make_layout(find_documents(1, 64, None, None), 1, 64, mesh)
        outs.append(hf_usp.unshard(hf_usp.usp_attention(*(shard_tensor(x, layout) for x in (q, k, v)), layout), layout))
    return torch.equal(*outs)


def test_pure_ulysses_is_bitwise_one_process(four_ranks: Ranks) -> None:
    assert all(four_ranks.run(bitwise_ulysses))


def backward_twice(degrees: tuple[int, int]) -> bool:
    """Whether a retained graph gives the same gradients again, and one that is not retained refuses."""
    import hf_usp

    mesh = hf_usp.UspMesh.build(ring_degree=degrees[0], ulysses_degree=degrees[1])
    layout = hf_usp.shard({"input_ids": torch.zeros(2, 32, dtype=torch.long)}, mesh)["usp"]
    inputs = [torch.randn(2, layout.local_length, h, 16, requires_grad=True) for h in (8, 4, 4)]
    out = hf_usp.usp_attention(*inputs, layout)
    first = torch.autograd.grad(out.square().sum(), inputs, retain_graph=True)
    second = torch.autograd.grad(out.square().sum(), inputs)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out.square().sum(), inputs)
    return all(map(torch.equal, first, second))


@pytest.mark.parametrize("degrees", [(4, 1), (2, 2), (1, 4)], ids=str)
def test_a_retained_graph_is_kept(four_ranks: Ranks, degrees: tuple[int, int]) -> None:
    """Tensors that attention keeps are freed in its backward, but not under retain_graph."""
    assert all(four_ranks.run(backward_twice, degrees))


def unshard_gradient() -> Any:
    """Gradients of a sum over ranks of losses on the unsharded tensor, and the share they should be."""
    import hf_usp
    from hf_usp.batch.shard import shard_tensor

    mesh = hf_usp.UspMesh.build(ring_degree=2, ulysses_degree=2)
    layout = hf_usp.shard({"input_ids": torch.zeros(2, 21, dtype=torch.long)}, mesh)["usp"]
    full = torch.randn(2, 21, 3, generator=torch.Generator().manual_seed(0))
    share = shard_tensor(full, layout).clone().requires_grad_()
    whole = hf_usp.unshard(share, layout)
    weights = [torch.randn(2, 21, 3, generator=torch.Generator().manual_seed(1 + r)) for r in range(4)]
    (whole * weights[dist.get_rank()]).sum().backward()
    return torch.equal(whole, full), (share.grad - shard_tensor(sum(weights), layout, 0)).abs().max().item()


def test_unshard_is_the_inverse_and_its_adjoint_sums(four_ranks: Ranks) -> None:
    for same, error in four_ranks.run(unshard_gradient):
        assert same and error < 1e-5


NONSENSE: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "whole numbers": (torch.int32, {}),
    "booleans": (torch.bool, {}),
    "complex numbers": (torch.complex64, {}),
    "causal in words": (torch.float32, {"causal": "no"}),
    "a window of True": (torch.float32, {"sliding_window": True}),
    "scaling of NaN": (torch.float32, {"scaling": float("nan")}),
    "softcap of 0": (torch.float32, {"softcap": 0.0}),
    "a negative softcap": (torch.float32, {"softcap": -5.0}),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_is_refused(name: str) -> None:
    import hf_usp

    mesh = hf_usp.UspMesh.build(ring_degree=1, ulysses_degree=1)
    layout = hf_usp.shard({"input_ids": torch.ones(1, 4, dtype=torch.int64)}, mesh)["usp"]
    dtype, options = NONSENSE[name]
    q = torch.ones(1, 4, 2, 8, dtype=dtype)
    with pytest.raises(hf_usp.UspError):
        hf_usp.usp_attention(q, q, q, layout, **options)
