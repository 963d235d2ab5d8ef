"""Two nodes on one machine: pure ulysses, pure ring and the hybrid over a link of set speed, two processes on a side.

    sudo python benchmarks/two_nodes.py                     # 5 speeds, 2 lengths, 5 to 10 minutes
    sudo python benchmarks/two_nodes.py --rates 100 --tokens 2048 --repeats 1

Makes two network namespaces joined by a veth pair whose rate `tc` limits (token bucket), starts two processes in each,
and removes everything again, also when it is interrupted. Inside a namespace processes talk over its loopback. Nothing
but these processes uses the link, and no other network is touched. Needs Linux, iproute2 and the rights to make
namespaces; without them it says so and changes nothing.

One causal attention call, forward and backward: bytes that crossed the link are counted (by the link itself) beside
those that the plan predicts; wall time, the smallest of the repeats, is drawn beside the roofline's prediction, whose
rates are measured in the same run. Writes results/two_nodes-<date>.md, .json and .png.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
from notes import machine_notes  # noqa: E402

import hf_usp  # noqa: E402
from hf_usp.batch.layout import make_layout  # noqa: E402
from hf_usp.batch.shard import shard_tensor  # noqa: E402
from hf_usp.planner.hardware import Link, Machine, Rate  # noqa: E402
from hf_usp.planner.roofline import attention  # noqa: E402
from hf_usp.planner.workload import Degrees, ModelShape, TrainingStep  # noqa: E402
from hf_usp.sharding.heads import split_heads  # noqa: E402
from hf_usp.sharding.masks import Documents  # noqa: E402
from hf_usp.sharding.schedule import ring_per_node  # noqa: E402

HEADS, KV_HEADS, WIDTH = 8, 2, 64
SHAPE = ModelShape(1, HEADS * WIDTH, HEADS * WIDTH, HEADS, KV_HEADS, WIDTH, 1)
# ulysses, ring, and whether transfers run beside tiles.
WAYS = {"ulysses 4": (4, 1, True), "ring 4": (1, 4, True), "ring 4, no overlap": (1, 4, False)}
WAYS |= {"ulysses 2 x ring 2": (2, 2, True), "ulysses 2 x ring 2, no overlap": (2, 2, False)}
COLOURS = {"ulysses 4": "#c2562d", "ring 4": "#3d6fb4", "ulysses 2 x ring 2": "#1b7f5c"}
PORT, ADDRESSES = 29555, ("10.213.77.1", "10.213.77.2")


# --- in a namespace ---------------------------------------------------------------------------------------------------


def crossed() -> int:
    """Bytes that this side has put on the link so far."""
    return int(Path(f"/sys/class/net/{os.environ['GLOO_SOCKET_IFNAME']}/statistics/tx_bytes").read_text())


def smallest(step: Callable[[], Any], repeats: int) -> float:
    """Seconds until all ranks are done, smallest of the repeats after one that warms up."""
    times = []
    for _ in range(repeats + 1):
        dist.barrier()
        start = time.perf_counter()
        step()
        dist.barrier()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def rates(repeats: int) -> dict[str, float]:
    """FLOP/s of a tile and bytes/s of the loopback, all four processes at work; seconds of a barrier."""
    q, k = torch.randn(1, HEADS, 1024, WIDTH).bfloat16(), torch.randn(1, KV_HEADS, 1024, WIDTH).bfloat16()
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    tile = smallest(lambda: flash(q, k, k, 0.0, False), repeats)
    # rank ^ 1 is in the same namespace.
    sent, arriving = torch.zeros(1 << 22), torch.empty(1 << 22)

    def swap() -> None:
        peer = dist.get_rank() ^ 1
        both = [dist.P2POp(dist.isend, sent, peer), dist.P2POp(dist.irecv, arriving, peer)]
        for work in dist.batch_isend_irecv(both):
            work.wait()

    exchange, nothing = smallest(swap, repeats), smallest(lambda: None, repeats)
    flops = 4 * HEADS * 1024 * 1024 * WIDTH / max(tile - nothing, 1e-6)
    return {"flops": flops, "loopback": (4 << 22) / max(exchange - nothing, 1e-6), "barrier": nothing}


def case_seconds(ulysses: int, ring: int, overlap: bool, tokens: int, repeats: int) -> dict[str, float]:
    """Seconds of forward and backward, and bytes that crossed the link from this side, per step."""
    mesh = hf_usp.UspMesh.build(ring_degree=ring, ulysses_degree=ulysses)
    layout = make_layout(Documents.from_bounds([0, tokens]), 1, tokens, mesh)
    torch.manual_seed(0)
    full = [torch.randn(1, tokens, heads, WIDTH).bfloat16() for heads in (HEADS, KV_HEADS, KV_HEADS)]
    q, k, v = (shard_tensor(x, layout).contiguous().requires_grad_() for x in full)
    gradient = torch.ones_like(q)
    issue = dist.batch_isend_irecv

    def issue_and_wait(operations: list[Any]) -> list[Any]:
        for work in issue(operations):
            work.wait()
        return []

    if not overlap:
        dist.batch_isend_irecv = issue_and_wait  # type: ignore[assignment]
    try:
        before = crossed()
        seconds = smallest(lambda: hf_usp.usp_attention(q, k, v, layout).backward(gradient), repeats)
        return {"seconds": seconds, "crossed": (crossed() - before) / (repeats + 1)}
    finally:
        dist.batch_isend_irecv = issue


def rank_main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    measured: dict[str, Any] = {"rates": rates(args.repeats), "cases": []}
    for tokens in args.tokens:
        for name, (ulysses, ring, overlap) in WAYS.items():
            row: dict[str, Any] = {"way": name, "tokens": tokens}
            row |= case_seconds(ulysses, ring, overlap, tokens, args.repeats)
            measured["cases"].append(row)
    # Rank 0 is on one side; both sides send the same in a causal zigzag, or nearly.
    if dist.get_rank() == 0:
        args.report.write_text(json.dumps(measured))
    dist.barrier()
    dist.destroy_process_group()


# --- outside ----------------------------------------------------------------------------------------------------------


class TwoNamespaces:
    """Two namespaces joined by a link; gone when the block is left."""

    def __init__(self) -> None:
        self.names = [f"usp{os.getpid()}{side}" for side in "ab"]
        self.links = [f"v{os.getpid()}{side}" for side in "ab"]

    def __enter__(self) -> TwoNamespaces:
        try:
            for name in self.names:
                _run("ip", "netns", "add", name)
            _run(
                "ip",
                "link",
                "add",
                self.links[0],
                "netns",
                self.names[0],
                "type",
                "veth",
                "peer",
                "name",
                self.links[1],
                "netns",
                self.names[1],
            )
            for name, link, address in zip(self.names, self.links, ADDRESSES, strict=True):
                _run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", link)
                _run("ip", "-n", name, "link", "set", link, "up")
                _run("ip", "-n", name, "link", "set", "lo", "up")
            self.limit(1000)
        except BaseException:
            self.__exit__()
            raise
        return self

    def limit(self, megabits: int) -> None:
        """Set the rate of the link, both ways."""
        for name, link in zip(self.names, self.links, strict=True):
            _run(
                "tc",
                "-n",
                name,
                "qdisc",
                "replace",
                "dev",
                link,
                "root",
                "tbf",
                "rate",
                f"{megabits}mbit",
                "burst",
                "512kb",
                "latency",
                "50ms",
            )

    def __exit__(self, *_: object) -> None:
        for name in self.names:  # takes its end of the link with it
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _run(*command: str) -> None:
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise PermissionError(f"`{' '.join(command)}`: {ended.stderr.strip() or ended.returncode}")


def run_rate(nodes: TwoNamespaces, megabits: int, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Start the four processes, two in each namespace, and read what rank 0 wrote."""
    nodes.limit(megabits)
    report = folder / f"{megabits}.json"
    command = [sys.executable, __file__, "--report", str(report), "--repeats", str(args.repeats), "--tokens"]
    command += [str(tokens) for tokens in args.tokens]
    processes = []
    try:
        for rank in range(4):
            environment = os.environ | {
                "RANK": str(rank),
                "WORLD_SIZE": "4",
                "LOCAL_RANK": str(rank % 2),
                "LOCAL_WORLD_SIZE": "2",
                "MASTER_ADDR": ADDRESSES[0],
                "MASTER_PORT": str(PORT),
                "OMP_NUM_THREADS": "1",
                "GLOO_SOCKET_IFNAME": nodes.links[rank // 2],
            }
            inside = ["ip", "netns", "exec", nodes.names[rank // 2], *command]
            processes.append(subprocess.Popen(inside, env=environment))
        deadline = time.monotonic() + args.limit
        for process in processes:
            if process.wait(max(1.0, deadline - time.monotonic())):
                raise RuntimeError(f"a process ended with {process.returncode} at {megabits} Mbit/s")
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return json.loads(report.read_text())


def predicted_crossing(ulysses: int, ring: int, tokens: int) -> int:
    """Bytes that the plan sends from the first node to the second in one step, both directions of autograd."""
    per_node = ring_per_node(range(4), ulysses, 2)
    mesh = hf_usp.UspMesh(ring, ulysses, 0, 0, tuple(range(4)), None, None, None, ring_per_node=per_node)
    layout = make_layout(Documents.from_bounds([0, tokens]), 1, tokens, mesh)
    shares = split_heads(HEADS, KV_HEADS, ulysses)
    total, unit = 0, WIDTH * 2
    for rank in (0, 1):
        ring_rank, ulysses_rank = divmod(rank, ulysses)
        mine = shares[ulysses_rank]
        for other, theirs in enumerate(shares):
            if ring_rank * ulysses + other >= 2:  # q, k, v and the output, and their gradients the other way round
                both = 2 * theirs.num_query + 2 * theirs.num_kv + 2 * mine.num_query + 2 * mine.num_kv
                total += tokens // 4 * unit * both
        for step in layout.ring_schedule(ring_rank=ring_rank).steps[1:]:
            row = 2 * mine.num_kv * unit
            total += 2 * step.num_sent * row * (step.send_rank * ulysses + ulysses_rank >= 2)
            total += step.num_received * row * (step.recv_rank * ulysses + ulysses_rank >= 2)
    return total


def prediction(way: str, tokens: int, megabits: int, found: dict[str, float]) -> float:
    """Seconds that the roofline gives this case, from the rates found in the same run."""
    ulysses, ring, overlap = WAYS[way]
    link = megabits * 1e6 / 8
    machine = Machine(
        "two namespaces",
        found["flops"],
        1e9,
        4e9,
        (Link(2, found["loopback"], latency=1e-3), Link(4, link, shared=link, latency=1e-3)),
        {"measured": Rate(1.0, 1.0, 1.0)},
        1,
        full_ramp=0.0,
        causal_ramp=0.0,
        tail=0.0,
        launch=1e-3,
    )
    job, degrees = TrainingStep(tokens, overlap=overlap), Degrees(ulysses, ring)
    return sum(attention(SHAPE, degrees, job, machine, backward=back).seconds for back in (False, True))


def draw(lines: list[dict[str, Any]], file: Path) -> None:
    """Seconds over the link's speed, one panel a length: measured as points and lines, predicted dashed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lengths = sorted({line["tokens"] for line in lines})
    figure, panels = pyplot.subplots(
        1, len(lengths), figsize=(5.6 * len(lengths), 4.6), squeeze=False, layout="constrained"
    )
    for axes, tokens in zip(panels[0], lengths, strict=True):
        for way in WAYS:
            own = sorted((x for x in lines if (x["way"], x["tokens"]) == (way, tokens)), key=lambda x: x["rate"])
            colour, blocking = COLOURS[way.removesuffix(", no overlap")], way.endswith("no overlap")
            rate = [x["rate"] for x in own]
            style: dict[str, Any] = {"color": colour, "marker": "x" if blocking else "o"}
            axes.plot(rate, [x["seconds"] for x in own], **style, linewidth=0.8 if blocking else 1.8, label=way)
            if not blocking:
                axes.plot(rate, [x["predicted_seconds"] for x in own], color=colour, linestyle="--", linewidth=1)
        axes.set(xscale="log", yscale="log", xlabel="link between the nodes, Mbit/s", title=f"{tokens:,} tokens")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("seconds, forward and backward (dashed: roofline)")
    panels[0][-1].legend(fontsize=8, frameon=False)
    figure.savefig(file, dpi=120)


def as_table(lines: list[dict[str, Any]]) -> str:
    """Markdown."""
    head = ["Mbit/s", "tokens", "mesh", "crossed the link, MB", "plan, MB", "seconds", "roofline, s"]
    rows = [head, ["---"] * len(head)]
    for x in lines:
        crossing = [f"{x['crossed'] / 1e6:.3f}", f"{x['planned'] / 1e6:.3f}"]
        rows.append(
            [
                str(x["rate"]),
                str(x["tokens"]),
                x["way"],
                *crossing,
                f"{x['seconds']:.3f}",
                f"{x['predicted_seconds']:.3f}",
            ]
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def refusal() -> str | None:
    """Why this machine cannot do it, or None."""
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if not sys.platform.startswith("linux") or missing:
        return (
            f"two_nodes: needs Linux with iproute2 ({', '.join(missing) or sys.platform} missing). Nothing was changed."
        )
    if os.geteuid() != 0:
        return "two_nodes: making network namespaces needs root: run it with sudo. Nothing was changed."
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=int, nargs="+", default=[10, 30, 100, 300, 1000], help="Mbit/s")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=float, default=300.0, help="most seconds for one speed")
    parser.add_argument("--output", type=Path, default=Path("results"))
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)  # of a process inside a namespace
    args = parser.parse_args()
    if args.report is not None:
        rank_main(args)
        return 0
    if (reason := refusal()) is not None:
        print(reason, file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    lines: list[dict[str, Any]] = []
    try:
        with TwoNamespaces() as nodes, tempfile.TemporaryDirectory() as folder:
            for rate in args.rates:
                found = run_rate(nodes, rate, args, Path(folder))
                for case in found["cases"]:
                    ulysses, ring, _ = WAYS[case["way"]]
                    case |= {"rate": rate, "planned": predicted_crossing(ulysses, ring, case["tokens"])}
                    lines.append(case | {"rates": found["rates"]})
                print(f"{rate} Mbit/s: done", flush=True)
    except PermissionError as error:
        print(f"two_nodes: not allowed to make namespaces here: {error}. Nothing is left behind.", file=sys.stderr)
        return 2
    # One prediction for all speeds: from the best rates that were found, those least disturbed.
    best = {name: max(line["rates"][name] for line in lines) for name in ("flops", "loopback")}
    for line in lines:
        line["predicted_seconds"] = prediction(line["way"], line["tokens"], line["rate"], best)
    write(lines, args)
    return 0


def write(lines: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Table, figures and picture."""
    command = f"python benchmarks/two_nodes.py --rates {' '.join(map(str, args.rates))} --tokens "
    command += f"{' '.join(map(str, args.tokens))} --repeats {args.repeats}"
    notes = machine_notes(command)
    sizes = f"{HEADS} query and {KV_HEADS} kv heads of width {WIDTH}, bf16, causal, one row; 4 processes, 2 on a side."
    text = "\n\n".join(["# Two nodes, a slow link between them", *notes.values(), sizes, as_table(lines), EXPLANATION])
    args.output.mkdir(parents=True, exist_ok=True)
    stem = args.output / f"two_nodes-{date.today().isoformat()}"
    stem.with_suffix(".md").write_text(text + "\n")
    stem.with_suffix(".json").write_text(json.dumps(notes | {"lines": lines}, indent=1))
    draw(lines, stem.with_suffix(".png"))
    print(f"{text}\n\nwritten to {stem}.md, .json and .png")


EXPLANATION = """Crossed: bytes that the first node put on the link in one step, headers of packets and barriers
included, as the link counted them. Plan: what the plan sends there. Seconds: wall time, the smallest of the repeats;
four processes share the cores, so one computes while another's transfer runs even where a process itself waits: without
overlap costs less here than on four machines. Roofline: from the best rates of a tile and of the loopback found in the
run, and the link's set speed; it takes every hop for that of the rank that receives whole blocks. No overlap: every
transfer is waited for as soon as it is posted."""


if __name__ == "__main__":
    sys.exit(main())
