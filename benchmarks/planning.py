"""CPU time of what is planned once per batch: assigning tokens to ring ranks, and one rank's ring schedule.

    python benchmarks/planning.py                       # 1,048,576 tokens in 10,000 documents, a minute

Documents of log-normal lengths, four batches each. Prints a table and writes it to results/planning-<date>.md.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np  # noqa: E402

from hf_usp.sharding.load_balance import assign_tokens  # noqa: E402
from hf_usp.sharding.masks import Documents, Mask  # noqa: E402
from hf_usp.sharding.schedule import make_ring_schedule  # noqa: E402


def packed(num_tokens: int, number: int, sigma: float, seed: int) -> Documents:
    """`number` documents whose lengths are log-normal, with this sigma."""
    lengths = np.random.default_rng(seed).lognormal(0, sigma, number)
    inside = np.cumsum(np.maximum(1, lengths / lengths.sum() * num_tokens).astype(int))
    return Documents.from_bounds([0, *inside[inside < num_tokens].tolist(), num_tokens])


def cpu_ms(work: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """The smallest of several, and the result."""
    times = []
    for _ in range(repeats):
        begun = time.process_time()
        result = work()
        times.append((time.process_time() - begun) * 1e3)
    return min(times), result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1 << 20)
    parser.add_argument("--documents", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("results"))
    args = parser.parse_args()
    lines = [
        "| ring ranks | sigma | order | assignment, ms | schedule of a rank, ms | together, most |",
        "| --- " * 6 + "|",
    ]
    for ring in (4, 8, 16):
        for sigma in (0.5, 1.0, 1.5):
            assigning, plans, orders = [], [], set()
            for seed in range(4):
                mask = Mask(packed(args.tokens, args.documents, sigma, seed))
                ms, assigned = cpu_ms(partial(assign_tokens, 1, args.tokens, ring, "auto", [mask]), args.repeats)
                assigning.append(ms)
                plans.append(cpu_ms(partial(make_ring_schedule, assigned.shards, mask, 0), args.repeats)[0])
                orders.add(assigned.order)
            most = max(a + b for a, b in zip(assigning, plans, strict=True))
            cells = [str(ring), str(sigma), ", ".join(sorted(orders))]
            cells += [f"{min(x):.0f} to {max(x):.0f}" for x in (assigning, plans)] + [f"{most:.0f}"]
            lines.append("| " + " | ".join(cells) + " |")
            print(lines[-1], flush=True)
    cpu = next((x.split(":")[1].strip() for x in open("/proc/cpuinfo") if x.startswith("model name")), "unknown")
    command = f"python benchmarks/planning.py --tokens {args.tokens} --documents {args.documents}"
    machine = f"{os.cpu_count()} cores, {cpu}; numpy {np.__version__}, Python {platform.python_version()}"
    table = "\n".join(lines)
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / f"planning-{date.today().isoformat()}.md"
    file.write_text(
        f"# Planning a batch\n\n`{command}`\n\n{args.tokens} tokens in {args.documents} documents of log-normal "
        f"length, four batches; CPU time of one thread, smallest of {args.repeats}\n\n{machine}\n\n{table}\n"
    )
    print(f"written to {file}")


if __name__ == "__main__":
    main()
