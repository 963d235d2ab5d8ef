"""Which heads each ulysses rank keeps. Integers only: no torch."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from ..errors import UspConfigError
from ..utils.validation import check_positive_int


@dataclass(frozen=True)
class HeadShare:
    """Heads of one ulysses rank.

    Attributes:
        q0: first query head.
        q1: head after the last query head.
        k0: first kv head that they read.
        k1: head after the last kv head that they read.
        runs: (q0, q1, k0, k1) in local numbers. Inside a run every kv head serves equally many query heads in order, as
            grouped-query kernels expect. An even split is one run.
    """

    q0: int
    q1: int
    k0: int
    k1: int
    runs: tuple[tuple[int, int, int, int], ...]

    @property
    def num_query(self) -> int:
        """Number of query heads."""
        return self.q1 - self.q0

    @property
    def num_kv(self) -> int:
        """Number of kv heads."""
        return self.k1 - self.k0


def split_heads(num_heads: int, num_kv_heads: int, ulysses_degree: int) -> tuple[HeadShare, ...]:
    """Split any number of heads over `ulysses_degree` ranks, as evenly as query heads allow.

    A kv head is sent once to every rank that reads it. Raises `UspConfigError` where grouped-query attention itself is
    undefined (num_heads not a multiple of num_kv_heads).

    Six query heads over two kv heads on four ranks; the second rank has heads 2 and 3, which read different kv heads:

    >>> [(s.q0, s.q1, s.k0, s.k1) for s in split_heads(6, 2, 4)]
    [(0, 2, 0, 1), (2, 4, 0, 2), (4, 5, 1, 2), (5, 6, 1, 2)]
    """
    check_heads(num_heads, num_kv_heads)
    check_positive_int(required=True, ulysses_degree=ulysses_degree)
    per_kv = num_heads // num_kv_heads
    shares = []
    for rank in range(ulysses_degree):
        # The first num_heads % U ranks take one head more.
        q0 = rank * (num_heads // ulysses_degree) + min(rank, num_heads % ulysses_degree)
        q1 = (rank + 1) * (num_heads // ulysses_degree) + min(rank + 1, num_heads % ulysses_degree)
        k0, k1 = (q0 // per_kv, -(-q1 // per_kv)) if q1 > q0 else (0, 0)
        shares.append(HeadShare(q0, q1, k0, k1, _runs(q0, q1, per_kv)))
    return tuple(shares)


def check_heads(num_heads: int, num_kv_heads: int) -> None:
    """Raise `UspConfigError` unless the query heads are a multiple of the kv heads.

    >>> check_heads(14, 2)
    """
    if num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads:
        raise UspConfigError(
            f"{num_heads} query heads over {num_kv_heads} kv heads",
            rule="every kv head serves the same number of query heads, at least one",
            remedy="check num_attention_heads and num_key_value_heads of the model",
        )


def _runs(q0: int, q1: int, per_kv: int) -> tuple[tuple[int, int, int, int], ...]:
    """Merge kv heads that serve equally many of the local query heads into uniform runs."""
    runs: list[tuple[int, int, int, int]] = []
    for kv in range(q0 // per_kv, -(-q1 // per_kv)):
        first, last = max(q0, kv * per_kv) - q0, min(q1, (kv + 1) * per_kv) - q0
        local = kv - q0 // per_kv
        if runs and (runs[-1][1] - runs[-1][0]) == (last - first) * (runs[-1][3] - runs[-1][2]):
            runs[-1] = (runs[-1][0], last, runs[-1][2], local + 1)
        else:
            runs.append((first, last, local, local + 1))
    return tuple(runs) if q1 > q0 else ()


def group_heads(num_heads: int, num_kv_heads: int, groups: int, ulysses_degree: int) -> tuple[HeadShare, ...]:
    """Cut heads into `groups` groups that attend one after the other; each has a head for every ulysses rank.

    A group is some kv heads with their query heads. Where there are more groups than kv heads, it is a part of the
    query heads of one kv head. Where that many groups cannot be made, there are fewer, at least one.

    >>> [(g.q0, g.q1, g.k0, g.k1) for g in group_heads(8, 2, 4, 2)]
    [(0, 2, 0, 1), (2, 4, 0, 1), (4, 6, 1, 2), (6, 8, 1, 2)]
    >>> len(group_heads(8, 2, 8, 2))
    4
    """
    check_heads(num_heads, num_kv_heads)
    check_positive_int(required=True, groups=groups, ulysses_degree=ulysses_degree)
    per_kv = num_heads // num_kv_heads
    for number in range(min(groups, num_heads), 1, -1):
        parts = -(-number // num_kv_heads)  # of each kv head, where there are more groups than those
        if parts == 1:
            edges = [per_kv * (i * num_kv_heads // number) for i in range(number + 1)]
        else:
            cuts = [i * per_kv // parts for i in range(parts)]
            edges = [kv * per_kv + cut for kv in range(num_kv_heads) for cut in cuts] + [num_heads]
        sizes = [q1 - q0 for q0, q1 in itertools.pairwise(edges)]
        if min(sizes) >= ulysses_degree:
            break
    else:
        edges = [0, num_heads]
    return tuple(
        HeadShare(q0, q1, q0 // per_kv, -(-q1 // per_kv), _runs(q0, q1, per_kv)) for q0, q1 in itertools.pairwise(edges)
    )
