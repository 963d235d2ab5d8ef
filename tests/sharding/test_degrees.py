"""Heads over ulysses ranks, and the degrees that move the fewest bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_usp.errors import UspConfigError
from hf_usp.sharding.degrees import check_degrees, choose_ulysses_degree, ring_bytes, ulysses_bytes
from hf_usp.sharding.heads import split_heads

# (query heads, kv heads, ulysses degree): Qwen2 0.5B and 1.5B odd splits, MQA on more ranks than heads, SmolLM2.
ODD = [(14, 2, 4), (7, 1, 4), (4, 1, 4), (9, 3, 2), (9, 3, 4), (2, 1, 4), (1, 1, 3), (12, 4, 8), (28, 4, 8), (6, 6, 4)]
cases = st.tuples(st.integers(1, 8), st.integers(1, 8), st.integers(1, 12)).map(lambda x: (x[0] * x[1], x[1], x[2]))


def check_shares(heads: int, kv_heads: int, degree: int) -> None:
    """Every query head is on one rank, and each run pairs it with the kv head that it reads."""
    shares = split_heads(heads, kv_heads, degree)
    per_kv = heads // kv_heads
    assert len(shares) == degree
    assert [q for s in shares for q in range(s.q0, s.q1)] == list(range(heads)), "each query head once, in order"
    sizes = [s.num_query for s in shares]
    assert max(sizes) - min(sizes) <= 1, "as even as whole heads allow"
    for share in shares:
        served = []
        for q0, q1, k0, k1 in share.runs:
            assert 0 <= q0 < q1 and 0 <= k0 < k1, "no empty run"
            group, remainder = divmod(q1 - q0, k1 - k0)
            assert remainder == 0, "a run is uniform"
            served += [(share.q0 + q0 + i, share.k0 + k0 + i // group) for i in range(q1 - q0)]
        assert served == [(q, q // per_kv) for q in range(share.q0, share.q1)]
        read = {q // per_kv for q in range(share.q0, share.q1)}
        assert read == set(range(share.k0, share.k1)), "the kv heads that travel are those that are read"


@given(cases)
def test_any_number_of_heads_is_dealt_completely(case: tuple[int, int, int]) -> None:
    check_shares(*case)


@pytest.mark.parametrize(("heads", "kv_heads", "degree"), ODD)
def test_odd_head_counts(heads: int, kv_heads: int, degree: int) -> None:
    check_shares(heads, kv_heads, degree)


def test_an_even_split_is_one_run_and_moves_kv_heads_once() -> None:
    for share in split_heads(32, 8, 4):
        assert share.runs == ((0, 8, 0, 2),)
    assert sum(s.num_kv for s in split_heads(32, 8, 8)) == 8
    assert sum(s.num_kv for s in split_heads(32, 4, 8)) == 8, "fewer kv heads than ranks: one for each rank"


def test_fewer_heads_than_ranks_leave_some_without_work() -> None:
    shares = split_heads(2, 1, 4)
    assert [s.num_query for s in shares] == [1, 1, 0, 0]
    assert [s.num_kv for s in shares] == [1, 1, 0, 0]
    assert [s.runs for s in shares] == [((0, 1, 0, 1),)] * 2 + [()] * 2


@pytest.mark.parametrize(("heads", "kv_heads"), [(7, 2), (4, 0), (0, 1), (4, -1), (2, 4)])
def test_heads_without_grouped_query_attention_are_refused(heads: int, kv_heads: int) -> None:
    with pytest.raises(UspConfigError, match="heads"):
        split_heads(heads, kv_heads, 1)


def test_a_degree_below_one_is_refused() -> None:
    with pytest.raises(UspConfigError, match="ulysses_degree=0"):
        split_heads(8, 8, 0)


def bytes_of(size: int, heads: int, kv_heads: int, degree: int) -> float:
    """Head exchanges and a causal zigzag ring, forward and backward, in u, written out for one mesh."""
    m, ring = max(kv_heads, degree), size // degree
    return 2 * (2 * heads + 2 * m) * (1 - 1 / degree) + 4.5 * m * (ring - 1)


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("group", [1, 2, 4, 8, 16])
def test_the_chosen_degree_moves_the_fewest_bytes(size: int, kv_heads: int, group: int) -> None:
    heads = group * kv_heads
    best, reason = choose_ulysses_degree(size, heads, kv_heads)
    even = [u for u in range(1, size + 1) if size % u == 0 and heads % u == 0]
    least = min(bytes_of(size, heads, kv_heads, u) for u in even)
    assert bytes_of(size, heads, kv_heads, best) == pytest.approx(least)
    assert f"ulysses {best} x ring {size // best}" in reason
    # The closed rule: as many as there are kv heads when size > 1 + group, else a pure ring. It weighs a ring step with
    # 4 instead of the 4.5 of a pruned ring that also sends gradients home, so it may be off by that ratio and no more.
    rule = min(size, kv_heads) if size > 1 + group else 1
    assert bytes_of(size, heads, kv_heads, rule) <= least * 4.5 / 4
    if size <= kv_heads and not (1 + group) * 8 / 9 <= size <= 1 + group:
        assert best == rule


@pytest.mark.parametrize(
    ("size", "heads", "kv_heads", "expected"),
    [
        (8, 32, 8, 8),  # Llama 3 8B, Qwen3 8B
        (16, 32, 8, 8),
        (64, 64, 8, 8),  # Llama 3 70B
        (4, 32, 8, 1),  # 4 ranks, 4 query heads per kv head: sending keys is cheaper than sending heads
        (4, 14, 2, 1),  # Qwen2 0.5B
        (4, 28, 28, 4),  # no grouping
        (4, 9, 3, 1),  # SmolLM2: 9 heads divide by no power of two
        (8, 16, 1, 1),  # one kv head for all
        (1, 32, 8, 1),
    ],
)
def test_the_degree_for_known_models(size: int, heads: int, kv_heads: int, expected: int) -> None:
    assert choose_ulysses_degree(size, heads, kv_heads)[0] == expected


@given(st.integers(1, 64), st.integers(1, 16), st.integers(1, 8), st.sampled_from((None, 1, 2, 3, 4, 8)))
def test_ulysses_stays_inside_a_node_and_nearly_even(size: int, kv_heads: int, group: int, node: int | None) -> None:
    heads = kv_heads * group
    best, _ = choose_ulysses_degree(size, heads, kv_heads, node)
    assert check_degrees(size, best) * best == size
    assert best == 1 or node is None or node % best == 0, "a ulysses group never crosses the edge of a node"
    assert max(s.num_query for s in split_heads(heads, kv_heads, best)) <= 1.05 * heads / best + 1e-9


def test_two_nodes_of_eight_take_ulysses_inside_and_ring_across() -> None:
    assert choose_ulysses_degree(16, 32, 8, ranks_per_node=8)[0] == 8
    assert choose_ulysses_degree(16, 64, 64, ranks_per_node=8)[0] == 8


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 64))
def test_byte_floors(heads: int, kv_heads: int, degree: int) -> None:
    total = ulysses_bytes(heads, kv_heads, degree) + ring_bytes(kv_heads, degree, 3)
    assert total == pytest.approx(bytes_of(3 * degree, heads, kv_heads, degree))
    assert ulysses_bytes(heads, kv_heads, 1) == 0 and ring_bytes(kv_heads, degree, 1) == 0


@pytest.mark.parametrize(("size", "degree"), [(4, 3), (4, 0), (0, 1), (4, -2), (2, 4)])
def test_degrees_that_do_not_fit_are_refused_with_the_choices(size: int, degree: int) -> None:
    with pytest.raises(UspConfigError, match="ulysses_degree") as refusal:
        check_degrees(size, degree)
    if size == 4:
        assert "1, 2, 4" in str(refusal.value)


@pytest.mark.parametrize("arguments", [(0, 8, 8), (4, 0, 1), (4, 7, 2), (4, 8, 0), (4, 8, 8, 0), (4, 8, 8, -8)])
def test_sizes_without_a_degree_are_refused(arguments: tuple[int, ...]) -> None:
    with pytest.raises(UspConfigError):
        choose_ulysses_degree(*arguments)
