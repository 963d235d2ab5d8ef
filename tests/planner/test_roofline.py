"""The roofline against published tables and closed formulas: orders, thresholds, memory."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hf_usp.errors import UspConfigError
from hf_usp.planner.hardware import GB, MACHINES, Link, Machine, Rate
from hf_usp.planner.memory_model import memory
from hf_usp.planner.roofline import attention, exposed_of, mask_area, predict, transfers
from hf_usp.planner.workload import Degrees, Indexer, ModelShape, Selected, TrainingStep
from hf_usp.sharding.load_balance import fixed_assignment
from hf_usp.sharding.masks import UNLIMITED, Documents, Mask
from hf_usp.sharding.schedule import make_ring_schedule, ring_per_node

from .published import SAME, TABLES
from .recipes import seconds

LLAMA3_8B = ModelShape(32, 4096, 14336, 32, 8, 128, 128256)


@pytest.mark.parametrize(("name", "ranks", "tokens", "what", "table"), TABLES)
def test_order_of_the_degrees_is_the_published_one(
    name: str, ranks: int, tokens: int, what: str, table: dict[int, float]
) -> None:
    mine = {u: seconds(MACHINES[name], ranks, tokens, what, u) for u in table}
    pairs = [(a, b) for a in table for b in table if table[a] > table[b] * (1 + SAME)]
    wrong = [(a, b) for a, b in pairs if mine[a] >= mine[b]]
    assert len(pairs) >= 4 and not wrong, (wrong, mine)


@pytest.mark.parametrize(("name", "ranks", "tokens", "what", "table"), TABLES[:5])
def test_the_best_degree_is_the_published_one(
    name: str, ranks: int, tokens: int, what: str, table: dict[int, float]
) -> None:
    assert min(table, key=lambda u: seconds(MACHINES[name], ranks, tokens, what, u)) == max(
        table, key=table.__getitem__
    )


def test_the_order_follows_the_links() -> None:
    """The same cards on a switch: ulysses gains, and where a network is slow it does not cross it."""
    switched = replace(MACHINES["l20-pcie"], links=(Link(8, 200 * GB),))
    assert seconds(switched, 8, 32768, "forward", 8) < seconds(switched, 8, 32768, "forward", 2)
    a800 = MACHINES["a800-nvlink"]
    assert seconds(a800, 16, 65536, "step", 8) < seconds(a800, 16, 65536, "step", 16)
    flat = replace(a800, links=(Link(16, 2000 * GB),))
    assert seconds(flat, 16, 65536, "step", 16) < seconds(flat, 16, 65536, "step", 1)


def ideal(link: float, flops: float = 600e12) -> Machine:
    """No ramps, no tails, no launches: only rates."""
    return Machine(
        "ideal",
        flops,
        80e9,
        1e30,
        (Link(64, link, latency=0.0),),
        {"ideal": Rate(1.0, 1.0, 1.0)},
        1,
        full_ramp=0.0,
        causal_ramp=0.0,
        tail=0.0,
        launch=0.0,
    )


@pytest.mark.parametrize("ulysses", [1, 8])
def test_a_hop_is_hidden_from_e_f_over_g_b_rows_on(ulysses: int) -> None:
    """n = e F / (G B): 6,000 tokens per GPU for a pure ring, 750 with ulysses 8 (600 TFLOP/s, 50 GB/s, G = 4)."""
    machine, degrees = ideal(50e9), Degrees(ulysses, 8)
    per_gpu = 6000 // ulysses

    def exposed(tokens: float, *, backward: bool = False, gradients: int = 2) -> float:
        """But for the last gradients home, which nothing hides where they are no relay's."""
        job = TrainingStep(int(tokens) * degrees.ranks, gradients=gradients)
        whole, relayed = (
            attention(LLAMA3_8B, degrees, replace(job, relay=relay), machine, backward=backward).ring_exposed
            for relay in (False, True)
        )
        last = int(tokens) * degrees.ranks // 8 * 2 * max(1, 8 // ulysses) * 128 * gradients / 50e9 if backward else 0.0
        assert (relayed > 0) == (whole - last > 1e-12), "the threshold is the same"
        return max(0.0, whole - last - 1e-12)

    assert exposed(per_gpu * 1.01) == 0 < exposed(per_gpu * 0.99)
    assert exposed(per_gpu * 0.81, backward=True) == 0 < exposed(per_gpu * 0.79, backward=True), "bf16 gradients: 0.8"
    assert (
        exposed(per_gpu * 1.21, backward=True, gradients=4) == 0 < exposed(per_gpu * 1.19, backward=True, gradients=4)
    )


@pytest.mark.parametrize(("tokens", "share"), [(32768, 0.105), (131072, 0.026)])
def test_exposed_all_to_all_over_causal_attention(tokens: int, share: float) -> None:
    """(1 + 1/G) e F (1 - 1/U) / (S B), as for H100 NVLink and U = 8."""
    it = attention(LLAMA3_8B, Degrees(8, 1), TrainingStep(tokens), ideal(380e9))
    assert it.ulysses / it.tiles == pytest.approx(share, rel=0.02)


def test_a_shared_link_is_shared() -> None:
    machine = replace(ideal(1.0), links=(Link(2, 100.0, latency=0.0), Link(8, 100.0, shared=100.0, latency=0.0)))
    assert machine.hop(100, 1, 8) == 1.0, "one of two crosses"
    assert machine.hop(100, 2, 8) == 2.0, "both cross"
    # 3/4 of the payload goes to other pairs, at half a link each; inside the pair half of it at a whole one.
    assert machine.all_to_all(100, 8) == 1.5 * 1.0 and machine.all_to_all(100, 2) == 0.5
    assert machine.all_to_all(100, 4, stride=2) == 1.5, "tensor-parallel neighbours in between: every peer is outside"


def test_a_collective_uses_all_links_of_a_node() -> None:
    """FSDP over two nodes of four: what crosses the edge goes through four cards, or the one that they share."""
    own = replace(ideal(1.0), links=(Link(4, 1000.0, latency=0.0), Link(8, 100.0, latency=0.0)))
    assert own.ring_collective(800, 8) == 800 * 7 / 8 / 400
    assert own.ring_collective(800, 4) == 800 * 3 / 4 / 1000
    assert own.ring_collective(800, 2, stride=4) == 400 / 100, "a rank of each node, with its own card"
    one = replace(own, links=(own.links[0], Link(8, 100.0, shared=100.0, latency=0.0)))
    assert one.ring_collective(800, 8) == 800 * 7 / 8 / 100
    assert one.ring_collective(800, 2, stride=4) == 400 / 25, "four such groups at a time"


# ranks of a node, tp, ulysses, ring: several nodes with one, some and all of their places, one node, and nodes that the
# ring fills unevenly, where the plan keeps the order of ranks.
SHAPES = [
    (8, 1, 2, 8),
    (8, 1, 1, 16),
    (4, 2, 1, 6),
    (8, 1, 8, 4),
    (8, 1, 1, 8),
    (16, 2, 2, 4),
    (4, 1, 8, 3),
    (4, 1, 1, 6),
    (6, 1, 4, 3),
    (4, 1, 2, 5),
]


@pytest.mark.parametrize(("node", "tp", "ulysses", "ring"), SHAPES)
@pytest.mark.parametrize("window", [None, 40])
def test_transfers_are_those_of_the_plan_in_its_order(
    node: int, tp: int, ulysses: int, ring: int, window: int | None
) -> None:
    """Step by step: how many ranks of a node, and of half a node, send to others at a time, and the rows of a rank."""
    tokens, parts = 32 * ring, (node // 2, node)
    per_node = ring_per_node(range(0, ring * ulysses * tp, tp), ulysses, node)
    mask = Mask(Documents.from_bounds([0, tokens]), UNLIMITED if window is None else window - 1)
    shards = fixed_assignment(tokens, ring, "zigzag" if window is None else "contiguous")
    plans = [make_ring_schedule(shards, mask, rank, per_node) for rank in range(ring)]
    unit, ranks = ulysses * tp, ring * ulysses * tp
    # Of a shared link that every sender fills alone: seconds are senders, whatever link they leave their part by.
    levels = [Link(parts[0], 1e30, latency=0.0), Link(parts[1], 1e30, latency=0.0), Link(1 << 10, 1e30, latency=0.0)]
    steps = list(zip(*(plan.steps[1:] for plan in plans), strict=True))
    busy = [i for i, step in enumerate(steps) if any(one.num_received for one in step)]
    assert busy == list(range(len(busy))), "those that carry nothing are the last"
    assert {max(one.num_received for one in steps[i]) for i in busy} <= ({32} if window is None else {32, 7})
    for level, part in enumerate(parts, start=1):
        links = [replace(link, shared=1.0) if at == level else link for at, link in enumerate(levels)]
        machine = replace(ideal(1.0), links=tuple(links))
        predicted = transfers(Degrees(ulysses, ring, tp), machine, 1.0, None if window is None else len(busy))
        assert len(predicted) == len(busy)
        for i, time in zip(busy, predicted, strict=True):
            leaving = [0] * (ranks // part + 1)
            for rank in range(ranks):
                reader = steps[i][rank // unit].send_rank * unit + rank % unit
                leaving[rank // part] += bool(steps[i][rank // unit].num_sent) and reader // part != rank // part
            assert round(time, 9) >= max(leaving), (i, part)
            if ranks % part == 0 or ranks <= part:
                assert round(time, 9) == max(leaving), (i, part)


def test_gradients_of_the_last_step_come_home_inside_a_node() -> None:
    """Two nodes of two: two steps between them, one inside; what each stage hides, by hand."""
    machine = replace(ideal(1.0), links=(Link(2, 10.0, latency=0.0), Link(4, 2.0, latency=0.0)))
    away = transfers(Degrees(1, 4), machine, 20.0)
    assert away == [10.0, 10.0, 2.0]
    assert exposed_of([7.0] * 4, away) == 3 + 3
    # Beside the four stages: 10; 10; the first gradients and the keys from inside, 12; the second gradients, 10.
    assert exposed_of([7.0] * 4, away, away) == 3 + 3 + 5 + 3 + 2
    assert transfers(Degrees(1, 4), machine, 20.0, 3) == [10.0] * 3, "a window's neighbours in the order of ranks"
    alone = replace(SHAPE_OF_ONE, window=1 << 12)
    full, wide = (
        attention(alone, Degrees(1, 4), TrainingStep(4096), machine, window, backward=True) for window in (None, 4095)
    )
    assert full.ring < wide.ring, "a window that is too short by one keeps the order of ranks, too"


SHAPE_OF_ONE = ModelShape(1, 64, 64, 1, 1, 64, 1)


def test_flops_are_those_of_the_model() -> None:
    job = TrainingStep(8192)
    it = predict(LLAMA3_8B, Degrees(), job, ideal(1e9))
    head_and_layers = LLAMA3_8B.params - LLAMA3_8B.hidden * LLAMA3_8B.vocab  # the embedding multiplies nothing
    dense = 6 * head_and_layers * 8192
    scores = 32 * 3 * 4 * mask_area(8192, None) * 4096
    assert it.flops == pytest.approx(dense + scores)
    assert it.exposed == 0 and 0 < it.mfu <= 1
    assert predict(LLAMA3_8B, Degrees(), replace(job, checkpointing=True), ideal(1e9)).seconds > it.seconds


@pytest.mark.parametrize("window", [None, 1, 700, 4096, 9000])
def test_mask_area(window: int | None) -> None:
    assert mask_area(4096, window) == sum(min(i + 1, window or 4096) for i in range(4096))


def test_a_window_needs_only_its_halo() -> None:
    shape = replace(LLAMA3_8B, window=4096, sliding_layers=16)
    job, machine, degrees = TrainingStep(1 << 20), ideal(50e9), Degrees(1, 8)
    full = attention(shape, degrees, job, machine)
    sliding = attention(shape, degrees, job, machine, 4096)
    assert sliding.ring == pytest.approx(full.ring / 224, rel=0.01)
    assert sliding.tiles == pytest.approx(full.tiles * 2 * 4096 / (1 << 20), rel=0.01)
    half = predict(shape, degrees, job, machine).attention
    assert half == pytest.approx(predict(LLAMA3_8B, degrees, job, machine).attention / 2, rel=0.02)


STATES = ("weights", "gradients", "optimizer")


def test_memory() -> None:
    assert LLAMA3_8B.params == 8_029_995_008
    job = TrainingStep(131072, checkpointing=True)
    one, many = memory(LLAMA3_8B, Degrees(8, 1), job), memory(LLAMA3_8B, Degrees(8, 2), replace(job, tokens=262144))
    assert one.weights == LLAMA3_8B.params * 4 / 8 == 2 * many.weights, "fp32 copies"
    assert sum(one.moments["gradients"][kind] for kind in STATES) == 16 * LLAMA3_8B.params / 8
    assert one.activations == many.activations and one.logits == many.logits, "grows with tokens per rank alone"
    small = memory(LLAMA3_8B, Degrees(8, 1), replace(job, optimizer=4))
    assert sum(small.moments["gradients"][kind] for kind in STATES) == 8 * LLAMA3_8B.params / 8
    away = memory(LLAMA3_8B, Degrees(8, 1), replace(job, offload_states=True))
    assert sum(away.moments["gradients"][kind] for kind in STATES) == 0
    assert away.host == 16 * LLAMA3_8B.params / 8 and one.host == 0
    ring = [memory(LLAMA3_8B, Degrees(1, r), TrainingStep(8192 * r, shard_params=False)) for r in (3, 8)]
    assert ring[0].total == ring[1].total, "two blocks of others' keys and values, never R"
    chunks = [memory(LLAMA3_8B, Degrees(8, 1), replace(job, loss_chunk_size=n)).logits for n in (1024, 2048)]
    assert one.logits == 12 * 16384 * 128256, "tokens of a rank"
    assert chunks[1] - chunks[0] == 14 * 1024 * 128256
    assert 2 * chunks[0] - chunks[1] == 4 * 4096 * 128256, "the head's gradient in fp32"
    assert memory(LLAMA3_8B, Degrees(8, 1), replace(job, checkpointing=False)).activations > 3 * one.activations
    offloaded = memory(LLAMA3_8B, Degrees(8, 1), replace(job, tokens=8 * 160_000, offload=True))
    assert offloaded.activations < memory(LLAMA3_8B, Degrees(8, 1), replace(job, tokens=8 * 160_000)).activations
    assert offloaded.host == 32 * 160_000 * 8192
    kernels = {k: memory(LLAMA3_8B, Degrees(8, 1), replace(job, kernel=k, mlp_chunk_size=1024)) for k in ("fa2", "fa3")}
    of = {k: it.moments["top layer, attention"]["activations"] for k, it in kernels.items()}
    assert of["fa2"] - of["fa3"] == 16384 * 128 * (2 * 2 * 32 - 2 * 4 * 8), "keys' gradients for every query head"
    assert memory(LLAMA3_8B, Degrees(8, 1, tp=2), job).weights == one.weights / 2
    assert one.total == sum(one.at_peak.values()) < sum(one.kinds.values())


def test_data_parallel_shards_weights_and_adds_tokens() -> None:
    job, machine = TrainingStep(32768), MACHINES["h100-nvlink"]
    alone = predict(LLAMA3_8B, Degrees(4, 2), job, machine)
    more = predict(LLAMA3_8B, Degrees(4, 2, dp_shard=2), job, machine)
    copies = predict(LLAMA3_8B, Degrees(4, 2, dp_replicate=2), job, machine)
    assert more.memory.weights == alone.memory.weights / 2 == copies.memory.weights / 2
    assert more.tokens == copies.tokens == 2 * alone.tokens
    assert more.attention == alone.attention == copies.attention


@pytest.mark.parametrize(
    ("shape", "degrees", "job", "named"),
    [
        (LLAMA3_8B, Degrees(), TrainingStep(0), "tokens=0"),
        (LLAMA3_8B, Degrees(ulysses=-1), TrainingStep(8), "ulysses=-1"),
        (replace(LLAMA3_8B, layers=0), Degrees(), TrainingStep(8), "layers=0"),
        (replace(LLAMA3_8B, sliding_layers=4), Degrees(), TrainingStep(8), "4 sliding layers of 32, window None"),
        (LLAMA3_8B, Degrees(64, 2), TrainingStep(4096), "128 ranks on ideal, which has links for 64"),
    ],
)
def test_refusals(shape: ModelShape, degrees: Degrees, job: TrainingStep, named: str) -> None:
    with pytest.raises(UspConfigError, match=named):
        predict(shape, degrees, job, ideal(1e9))


def test_what_layers_in_chunks_cost() -> None:
    """The part before attention 3 groups + 5 times instead of 4, less where attention is kept; messages of groups."""
    machine = replace(MACHINES["h100-nvlink"], memory_bandwidth=1e30)
    job = TrainingStep(1 << 20, checkpointing=True)
    whole = predict(LLAMA3_8B, Degrees(1, 8), job, machine)
    before = LLAMA3_8B.weights_around_attention["before"] * LLAMA3_8B.layers
    assert sum(LLAMA3_8B.weights_around_attention.values()) == LLAMA3_8B.layer_params
    once = 2 * job.tokens / 8 * before / (machine.flops * machine.matmul)
    for groups in (1, 4):
        tiled = replace(job, checkpointing=False, layer_chunk_size=4096, head_groups=groups, offload=True)
        mine = predict(LLAMA3_8B, Degrees(1, 8), tiled, machine)
        assert (mine.linear - whole.linear) / once == pytest.approx(3 * groups + 5 - 4)
        kept = predict(LLAMA3_8B, Degrees(1, 8), replace(tiled, keep_attention=32), machine)
        assert (mine.linear - kept.linear) / once == pytest.approx(groups)
        assert kept.attention < 0.82 * mine.attention and kept.memory.host - mine.memory.host == pytest.approx(
            32 * (1 << 17) * 32 * (128 * 2 + 4)
        )
        assert mine.ring_hidden + mine.ring >= whole.ring_hidden + whole.ring
        assert mine.attention == pytest.approx(whole.attention, rel=0.02)
    slower = MACHINES["h100-nvlink"]
    sums = [
        predict(LLAMA3_8B, Degrees(1, 8), replace(tiled, layer_chunk_size=chunk), slower).linear
        for chunk in (1024, 4096, 1 << 17)
    ]
    assert sums[0] > sums[1] > sums[2], "every chunk adds to gradients in fp32"
    assert sums[0] - sums[1] == pytest.approx(3 * (sums[1] - sums[2]) * 32 / 31, rel=0.01)


def test_layers_that_select_keys_cost_the_same_on_every_mesh() -> None:
    """DeepSeek-V3.2, the indexer's scores bound by memory: closed formulas, and the usual attention for short rows."""
    indexer, machine = Indexer(61, 61, 2048, 64, 128, 576, 1088), ideal(1e9)
    model = ModelShape(61, 7168, 2048, 128, 128, 64, 129280, indexer=indexer)
    assert [(int(window or 0), count) for window, count in model.layer_kinds] == [(0, 0), (0, 0), (2048, 61)]
    job, kind = TrainingStep(131072), Selected(2048)
    ahead = [attention(model, Degrees(u, 8 // u), job, machine, kind) for u in (1, 2, 8)]
    assert ahead[0] == ahead[1] == ahead[2] and ahead[0].ulysses == ahead[0].merges == 0
    assert ahead[0].ring_exposed == pytest.approx(131072 * (576 + 128) * 2 * 7 / 8 / 1e9)
    back = attention(model, Degrees(1, 8), job, machine, kind, backward=True)
    assert back.ring == pytest.approx(131072 * 576 * 2 * 7 / 8 / 1e9)
    pairs, rate = mask_area(131072, 2048) / 8, machine.flops * machine.matmul
    assert back.tiles == pytest.approx(2.5 * 2 * pairs * 128 * 1088 / rate)
    scored = 2 * 131072 * 131072 / 8 * 64 * 128 / rate
    assert ahead[0].tiles == pytest.approx(back.tiles / 2.5 + scored)
    slow = attention(model, Degrees(1, 8), job, replace(machine, memory_bandwidth=1e12), kind)
    assert slow.tiles == pytest.approx((3 * 2 * 16384 * 2048 * 576 + 12 * 131072 * 16384 * 64) / 1e12)
    short, usual = TrainingStep(2048), replace(model, indexer=None)
    assert attention(model, Degrees(2, 4), short, machine, kind) == attention(usual, Degrees(2, 4), short, machine)
    fewer = predict(model, Degrees(1, 8), job, machine).flops
    assert predict(usual, Degrees(1, 8), job, machine).flops > 2 * fewer
