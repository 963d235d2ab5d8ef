"""Ulysses and ring degrees of a context-parallel group, and the bytes that each moves. Integers only: no torch.

Symbols: P = U * R ranks, h query heads, g kv heads, m = max(g, U). Bytes are counted in u = local tokens * head width
* element size, per rank and layer, forward and backward (USP paper, arXiv 2405.07719, table 1, with pruned ring
transfers):

    ulysses 2 (2 h + 2 m) (1 - 1/U)        ring 4.5 m (R - 1)
"""

from __future__ import annotations

from ..errors import UspConfigError
from ..utils.validation import check_positive_int
from .heads import check_heads


def ulysses_bytes(num_heads: int, num_kv_heads: int, ulysses_degree: int) -> float:
    """Least bytes of the all-to-alls, forward and backward, in u.

    >>> ulysses_bytes(32, 8, ulysses_degree=8)  # 2 * (64 + 16) * 7/8
    140.0
    """
    m = max(num_kv_heads, ulysses_degree)
    return 2 * (2 * num_heads + 2 * m) * (1 - 1 / ulysses_degree)


def ring_bytes(num_kv_heads: int, ulysses_degree: int, ring_degree: int) -> float:
    """Least bytes of a causal zigzag ring that sends visible keys only, forward and backward, in u.

    >>> ring_bytes(8, ulysses_degree=1, ring_degree=8)  # 4.5 * 8 * 7
    252.0
    """
    return 4.5 * max(num_kv_heads, ulysses_degree) * (ring_degree - 1)


def even_degrees(cp_size: int, num_heads: int) -> list[int]:
    """Divisors of `cp_size` that leave every rank at most 5 % more query heads than the mean; 1 always does.

    >>> even_degrees(8, num_heads=14)
    [1, 2]
    """
    return [d for d in range(1, cp_size + 1) if cp_size % d == 0 and -(-num_heads // d) * d <= 1.05 * num_heads]


def choose_ulysses_degree(
    cp_size: int, num_heads: int, num_kv_heads: int, ranks_per_node: int | None = None
) -> tuple[int, str]:
    """The ulysses degree that sends the fewest bytes, and the reason as text.

    Candidates divide `cp_size`, fit inside a node of `ranks_per_node` ranks and leave every rank at most 5 % more query
    heads than the mean; 1 (a pure ring) always qualifies. Raises `UspConfigError` for sizes that no mesh has.

    >>> choose_ulysses_degree(16, num_heads=32, num_kv_heads=8, ranks_per_node=8)[0]
    8
    """
    check_heads(num_heads, num_kv_heads)
    node = cp_size if ranks_per_node is None else ranks_per_node
    check_positive_int(required=True, cp_size=cp_size, ranks_per_node=node)
    candidates = []
    for degree in even_degrees(cp_size, num_heads):
        if degree == 1 or (degree <= node and node % degree == 0):
            bytes_moved = ulysses_bytes(num_heads, num_kv_heads, degree)
            bytes_moved += ring_bytes(num_kv_heads, degree, cp_size // degree)
            candidates.append((bytes_moved, degree))
    cost, best = min(candidates)
    reason = (
        f"ulysses {best} x ring {cp_size // best} moves {cost:.1f} u per rank and layer, the fewest of "
        + ", ".join(f"{d}: {c:.1f}" for c, d in sorted(candidates, key=lambda x: x[1]))
        + f" (ulysses degree: u; {num_heads} query heads, {num_kv_heads} kv heads, {node} ranks a node)"
    )
    return best, reason


def check_degrees(cp_size: int, ulysses_degree: int) -> int:
    """Ring degree of a cp group. Raises `UspConfigError` where the ulysses degree does not divide its size.

    >>> check_degrees(cp_size=8, ulysses_degree=4)
    2
    """
    if ulysses_degree < 1 or cp_size < 1 or cp_size % ulysses_degree:
        divisors = [d for d in range(1, max(cp_size, 1) + 1) if cp_size % d == 0]
        raise UspConfigError(
            f"ulysses_degree={ulysses_degree} with a context-parallel size of {cp_size}",
            rule="context-parallel size = ulysses_degree x ring_degree, both integers of at least 1",
            remedy=f"choose ulysses_degree from {', '.join(map(str, divisors))}, or change the context-parallel size",
        )
    return cp_size // ulysses_degree
