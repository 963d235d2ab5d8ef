"""Every pitfall of torch's CPU flash operator: first shown on the operator itself, then not met through our kernel.

If a first half fails, torch has changed: look whether `hf_usp.kernels.cpu_flash` can become simpler.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from packaging.version import Version
from torch import Tensor

from hf_usp.kernels import KERNELS, Segments
from hf_usp.sharding.load_balance import fixed_assignment
from hf_usp.sharding.masks import Documents, Mask, visible
from hf_usp.sharding.tiles import cut_tiles

from .cases import Case, Data, allowed, assert_close, compute, draw, errors, oracle

FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
KERNEL = KERNELS["cpu_flash"]


def raw(x_LHD: Tensor) -> Tensor:
    return x_LHD.transpose(0, 1)[None]


def raw_error(case: Case, data: Data, *, causal: bool = False) -> float:
    """Error of the operator's own output, called without our kernel."""
    out, _ = FORWARD(*(raw(x) for x in data[:3]), 0.0, causal, scale=case.softmax.scale)
    exact = oracle(data, allowed(case), case.softmax).out
    return (out[0].transpose(0, 1) - exact).abs().max().item()


@pytest.mark.parametrize(("lq", "lk"), [(12, 20), (12, 12)])
def test_is_causal_is_aligned_to_the_top_left(lq: int, lk: int) -> None:
    case = Case((lq,), (lk,), right=0)
    data = draw(case, torch.float64)
    assert (raw_error(case, data, causal=True) < 1e-12) == (lq == lk)
    assert_close(compute(KERNEL, case, data), oracle(data, allowed(case), case.softmax), 1e-10)


@pytest.mark.parametrize(("queries", "keys"), [(0, 4), (4, 0)])
def test_an_empty_side_ends_the_process(queries: int, keys: int) -> None:
    program = (
        "import torch\n"
        f"q, k = torch.randn(1, 1, {queries}, 16), torch.randn(1, 1, {keys}, 16)\n"
        "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, k, 0.0, False)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=120, check=False)
    assert ended.returncode < 0, "killed by a signal"
    with pytest.raises(AssertionError, match="no segment is empty"):
        Segments((0, queries), (0, keys), -1, -1, torch.tensor([0, queries]), torch.tensor([0, keys]))


def test_no_plan_makes_an_empty_segment() -> None:
    """Single-token documents, windows of one key, more ranks than tokens: tiles always have queries and keys."""
    for mask in (Mask(Documents.from_bounds([0, 1, 2, 9]), left=0), Mask(Documents.from_bounds([0, 5]))):
        for order in ("contiguous", "zigzag"):
            shards = fixed_assignment(mask.documents.num_tokens, 4, order)
            for mine in shards:
                for theirs in shards:
                    tiles = cut_tiles(*visible(mine, theirs, mask))
                    assert (tiles.q1 > tiles.q0).all() and (tiles.k1 > tiles.k0).all()


def test_a_row_without_keys_has_log_sum_exp_zero() -> None:
    """Which a merge would take for a real weight. Every row of a segment sees a key, so no mask of ours hides a row."""
    q = k = torch.ones(1, 1, 2, 16, dtype=torch.float64)
    hidden = torch.tensor([[0.0, 0.0], [-torch.inf, -torch.inf]], dtype=torch.float64)
    _, lse = FORWARD(q, k, k, 0.0, False, attn_mask=hidden)
    assert lse[0, 0, 1] == 0.0
    with pytest.raises(AssertionError, match="at least one key"):
        Segments((0, 3), (0, 2), -1, 0, torch.tensor([0, 3]), torch.tensor([0, 2]))


def test_a_backward_with_infinite_log_sum_exp_gives_nan() -> None:
    """Rows that see nothing have log-sum-exp -inf after a merge. They are in no tile, so the kernel never gets them."""
    x = torch.ones(1, 1, 2, 16, dtype=torch.float64)
    lse = torch.full((1, 1, 2), -torch.inf, dtype=torch.float64)
    dq, _, _ = BACKWARD(x, x, x, x, x, lse, 0.0, False, attn_mask=torch.full((2, 2), -torch.inf, dtype=torch.float64))
    assert dq.isnan().any()
    nothing = Documents(*(torch.tensor(x).numpy() for x in ([0, 4], [0], [2])))
    tiles = cut_tiles(*Mask(nothing, left=0).interval(torch.arange(4).numpy()))
    assert tiles.q0.tolist() == [0] and tiles.q1.tolist() == [2]


def test_head_counts_that_do_not_divide_are_accepted_in_silence() -> None:
    q, k = torch.randn(1, 3, 4, 16), torch.randn(1, 2, 4, 16)
    out, _ = FORWARD(q, k, k, 0.0, False)
    assert out.shape == q.shape
    case = Case((4,), (4,), heads=(3, 2))
    with pytest.raises(AssertionError, match="multiple of kv heads"):
        compute(KERNEL, case, draw(case, torch.float32))


def test_bool_masks_dropout_and_other_value_widths_raise() -> None:
    q, k = torch.randn(1, 2, 4, 16), torch.randn(1, 2, 4, 16)
    with pytest.raises(RuntimeError, match="mask"):
        FORWARD(q, k, k, 0.0, False, attn_mask=torch.ones(4, 4, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="dropout"):
        FORWARD(q, k, k, 0.5, False)
    with pytest.raises(RuntimeError, match="head size"):
        FORWARD(q, k, k[..., :8], 0.0, False)
    case = Case((9,), (9,), left=3, right=0, widths=(16, 8))
    data = draw(case, torch.float64)
    assert_close(compute(KERNEL, case, data), oracle(data, allowed(case), case.softmax), 1e-10)


def test_the_stride_of_the_last_dim_is_ignored() -> None:
    """Mended in torch 2.14."""
    case = Case((9,), (9,))
    data = draw(case, torch.float64)
    spread = Data(*(torch.zeros(*x.shape, 2, dtype=x.dtype)[..., 0].copy_(x) for x in data))
    assert all(x.stride(2) == 2 for x in spread)
    mended = Version(torch.__version__).release >= (2, 14)
    assert raw_error(case, spread) < 1e-12 if mended else raw_error(case, spread) > 0.1
    assert_close(compute(KERNEL, case, spread), oracle(data, allowed(case), case.softmax), 1e-10)


def test_a_gradient_of_stride_zero() -> None:
    """The gradient that `out.sum().backward()` hands down."""
    case = Case((9,), (9,))
    data = draw(case, torch.float64)
    data = data._replace(dout=torch.ones((), dtype=torch.float64).expand(data.dout.shape))
    assert_close(compute(KERNEL, case, data), oracle(data, allowed(case), case.softmax), 1e-10)


def test_one_segment_makes_one_call_and_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rectangles and causal squares reach the operator as they are; packed causal segments one by one, unmasked."""
    calls = []

    def spy(*args: object, **kwargs: object) -> object:
        calls.append(kwargs["attn_mask"])
        return FORWARD(*args, **kwargs)

    monkeypatch.setattr("hf_usp.kernels.cpu_flash._forward", spy)
    for case, expected in ((Case((9,), (9,), right=0), 1), (Case((9,), (5,)), 1), (Case((9, 3), (9, 3), right=0), 2)):
        calls.clear()
        data = draw(case, torch.float64)
        result = compute(KERNEL, case, data)
        assert len(calls) == expected and not any(mask is not None for mask in calls)
        assert max(errors(result, oracle(data, allowed(case), case.softmax)).values()) < 1e-10
