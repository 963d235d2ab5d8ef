"""Random arguments of the Python functions: tensors of other kinds and shapes, numbers that are none, odd options."""

from __future__ import annotations

import math
import random
from typing import Any

import torch

import hf_usp
from hf_usp.config import OPTIONS

from .driver import Act

DTYPES = (
    torch.long,
    torch.int32,
    torch.int16,
    torch.uint8,
    torch.bool,
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.complex64,
    torch.int8,
)
ODD: tuple[Any, ...] = (
    None,
    0,
    1,
    2,
    4,
    8,
    -1,
    3,
    True,
    False,
    "2",
    "",
    "auto",
    "balanced",
    "zigzag",
    "spiral",
    2.0,
    math.nan,
    math.inf,
    1e300,
    10**30,
    [],
    {},
    (),
    [2],
    b"2",
    object(),
    torch.tensor(2),
    "eager",
    "cpu_flash",
    "flash_attn",
    "x" * 2000,
    "cpu",
    "h100-nvlink",
    "no.json",
    "/etc/passwd.json",
    "\ud800",
    "\x1b[31m",
)
SIZES = ("cp_size", "dp_replicate_size", "dp_shard_size", "tp_size", "sp_size")
COUNTS: tuple[Any, ...] = (
    torch.tensor(3),
    torch.tensor(3.5),
    7,
    0,
    -1,
    math.nan,
    "3",
    None,
    torch.tensor([1, 2]),
    True,
    torch.tensor(-2),
    torch.tensor(3, dtype=torch.bfloat16),
    torch.tensor(math.nan),
)


def alone() -> hf_usp.UspMesh:
    return hf_usp.UspMesh.build(ring_degree=1, ulysses_degree=1)


def show(x: Any) -> str:
    return f"{x.dtype} {tuple(x.shape)} {x.layout} {x.device}" if isinstance(x, torch.Tensor) else repr(x)[:60]


def tensor(r: random.Random, shape: tuple[int, ...], low: int = 0, high: int = 64) -> Any:
    """Mostly whole numbers; sometimes another dtype, another layout, or no tensor."""
    generator = torch.Generator().manual_seed(r.randint(0, 1 << 30))
    x = torch.randint(low, high, shape, generator=generator)
    if r.random() < 0.2:
        x = x.to(r.choice(DTYPES))
    kind = r.random()
    if kind < 0.06:
        return r.choice([x.tolist(), None, x.to("meta"), x.to_sparse() if x.ndim else x])
    return x.transpose(0, 1) if kind < 0.07 and x.ndim >= 2 else x


def shaped(r: random.Random, rows: int, length: int, wrong: float = 0.1) -> tuple[int, ...]:
    if r.random() > wrong:
        return rows, length
    return r.choice(
        [
            (rows, length + 1),
            (rows + 1, length),
            (rows * length,),
            (rows, length, 1),
            (1, length),
            (rows, 1),
            (),
            (0, length),
            (rows, 0),
            (rows, 1, length, length),
            (3, rows, length),
            (4, rows, length),
        ]
    )


def padding(r: random.Random, rows: int, length: int) -> Any:
    mask = torch.ones(rows, length, dtype=torch.long)
    kind, cut = r.random(), r.randint(0, length)
    if kind < 0.6:
        mask[:, :cut] = 0
        return mask if kind < 0.3 else mask.flip(1)
    if kind < 0.8:
        return torch.randint(-1, 3, (rows, length)).to(r.choice(DTYPES))
    return tensor(r, shaped(r, rows, length, 0.8), 0, 2)


def positions(r: random.Random, rows: int, length: int) -> Any:
    kind = r.random()
    if kind < 0.4:
        cut = r.randint(0, length)
        return torch.cat([torch.arange(cut), torch.arange(length - cut)])[None].expand(rows, -1)
    if kind < 0.6:
        return torch.arange(length)[None] + r.choice([-5, 3, 2**31, 2**62])
    return tensor(r, shaped(r, rows, length, 0.5), -1, length + 1)


def edges(r: random.Random, total: int) -> Any:
    kind = r.random()
    if kind < 0.5:
        return torch.tensor(sorted({0, total, r.randint(0, total)}), dtype=torch.int32)
    if kind < 0.7:
        return torch.tensor([r.randint(-2, total + 2) for _ in range(r.randint(0, 4))])
    return tensor(r, r.choice([(), (0,), (3,), (2, 2)]))


def batch(r: random.Random) -> dict[Any, Any]:
    rows, length = r.randint(1, 4), r.choice([1, 2, 3, 5, 8, 17, 33])
    x: dict[Any, Any] = {}
    makers: dict[str, tuple[float, Any]] = {
        "input_ids": (0.97, lambda: tensor(r, shaped(r, rows, length, 0.05), 0, r.choice([64, 2**31 - 1]))),
        "inputs_embeds": (0.05, lambda: torch.randn(rows, length, 8).to(r.choice(DTYPES))),
        "labels": (0.6, lambda: tensor(r, shaped(r, rows, length), -100)),
        "shift_labels": (0.1, lambda: tensor(r, shaped(r, rows, length), -100)),
        "attention_mask": (0.4, lambda: padding(r, rows, length)),
        "position_ids": (0.4, lambda: positions(r, rows, length)),
        "cu_seq_lens_q": (0.2, lambda: edges(r, rows * length)),
        "num_items_in_batch": (0.15, lambda: r.choice(COUNTS)),
        "token_type_ids": (0.1, lambda: tensor(r, shaped(r, rows, length))),
        r.choice(["pixel_values", "use_cache", "", "max_length_q"]): (
            0.05,
            lambda: r.choice([torch.zeros(2, 2), 5, "x", None, torch.zeros(())]),
        ),
    }
    for name, (often, make) in makers.items():
        if r.random() < often:
            x[name] = make()
    return x


def fuzz_shard(r: random.Random) -> tuple[Act, Any]:
    x = batch(r)
    options = {name: r.choice(ODD) for name in ("order", "kernel") if r.random() < 0.1}

    def act() -> None:
        ids = hf_usp.shard(x, alone(), **options).get("input_ids")
        assert ids is None or torch.equal(ids, x["input_ids"])

    return act, {name: show(value) for name, value in (x | options).items()}


def fuzz_config(r: random.Random) -> tuple[Act, Any]:
    options = {name: r.choice(ODD) for name in r.sample((*SIZES, *OPTIONS), r.randint(1, 3))}
    return lambda: repr(hf_usp.UspParallelismConfig(**options)), {n: show(x) for n, x in options.items()}


def fuzz_attention(r: random.Random) -> tuple[Act, Any]:
    rows, length, heads = r.randint(1, 2), r.choice([1, 3, 8]), r.choice([1, 2, 4, 6])
    width = r.choice([1, 4, 8, 16])
    kv_heads = r.choice([1, 2, 3, heads])
    dtype = torch.float32 if r.random() < 0.8 else r.choice(DTYPES)

    def one(*shape: int) -> Any:
        if r.random() < 0.06:
            shape = r.choice([shape[:-1], (*shape, 1), (shape[0] + 1, *shape[1:]), (*shape[:-1], 0)])
        x = torch.randn(shape).to(dtype if r.random() < 0.95 else r.choice(DTYPES))
        return x if r.random() < 0.97 else r.choice([None, x.tolist(), x.to("meta")])

    q, k = one(rows, length, heads, width), one(rows, length, kv_heads, width)
    v = one(rows, length, kv_heads, r.choice([width, 4]))
    choices: dict[str, tuple[Any, ...]] = {
        "scaling": (0.0, -1.0, math.nan, math.inf, "x", 1, None, torch.tensor(1.0), 1e300, True),
        "sliding_window": (0, 1, 3, -1, 10**30, 2**63 - 1, 1.5, "3", None, True, math.nan, torch.tensor(2)),
        "softcap": (0, 0.0, -5.0, 30.0, math.nan, "x", None, 1e-3, math.inf, True),
        "sinks": (torch.zeros(heads), torch.zeros(heads + 1), [0.0], torch.zeros(heads, dtype=torch.long), None),
        "causal": (False, True, None, 0, "no"),
    }
    options = {name: r.choice(values) for name, values in choices.items() if r.random() < 0.2}
    layout: Any = hf_usp.shard({"input_ids": torch.zeros(rows, length, dtype=torch.long)}, alone())["usp"]
    layout = layout if r.random() < 0.97 else r.choice([None, 3, {}])

    def act() -> None:
        out = hf_usp.usp_attention(q, k, v, layout, **options)
        assert out.is_floating_point() and out.shape == (*q.shape[:3], v.shape[3])

    return act, {"q": show(q), "k": show(k), "v": show(v), "layout": show(layout)} | {
        name: show(value) for name, value in options.items()
    }


def fuzz_mesh(r: random.Random) -> tuple[Act, Any]:
    ring, ulysses = r.choice(ODD), r.choice(ODD)
    return lambda: hf_usp.UspMesh.build(ring_degree=ring, ulysses_degree=ulysses), (show(ring), show(ulysses))
