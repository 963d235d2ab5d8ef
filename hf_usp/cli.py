"""The command `hf-usp`: `explain` says what a run would do, `check` whether a cluster is right.

torchrun --nproc_per_node 8 -m hf_usp check --output check.json
hf-usp explain --tokens 65536 --ranks 8 --heads 32 --kv-heads 8 --output explain.png
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from .errors import UspConfigError, UspError

BAD_INPUT = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status. Bad input is one message on standard error and status 2."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.act(options) or 0)
    except UspError as refusal:
        print(f"hf-usp: {refusal}", file=sys.stderr)
        return BAD_INPUT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "hf-usp", description="Sequence parallelism for Hugging Face models (ulysses x ring)."
    )
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    _add_explain(verbs)
    _add_check(verbs)
    return parser


def _add_explain(verbs: Any) -> None:
    verb = verbs.add_parser(
        "explain",
        help="degrees, tokens, tiles, balance and bytes of given sizes, and a picture",
        description="Print what one attention layer would do for given sizes: degrees, who holds which tokens, tiles "
        "per step, balance, bytes and messages, the kernel; and save a picture.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = verb.add_argument
    add("--tokens", type=int, default=argparse.SUPPRESS, help="tokens of a row (default: what --documents add up to)")
    add("--ranks", type=int, required=True, help="ranks that share a sequence (cp_size)")
    add("--heads", type=int, required=True, help="query heads")
    add("--kv-heads", type=int, default=argparse.SUPPRESS, help="kv heads (default: as many as query heads)")
    add("--head-dim", type=int, default=128, help="width of a head")
    add("--ulysses", type=int, default=argparse.SUPPRESS, help="ulysses degree (default: the fewest bytes)")
    add("--ranks-per-node", type=int, default=argparse.SUPPRESS, help="ulysses stays inside a node (default: one node)")
    add("--order", default="auto", help="auto, contiguous or zigzag")
    add("--window", type=int, default=argparse.SUPPRESS, help="keys that a query sees, itself included (default: all)")
    add("--chunk", type=int, default=argparse.SUPPRESS, help="size of chunks that see only themselves (default: none)")
    add(
        "--documents", "--document-lengths", type=_lengths, default=argparse.SUPPRESS, metavar="N,N,...",
        help="lengths of the documents packed in every row (default: one)",
    )  # fmt: skip
    add("--batch", type=int, default=1, help="rows")
    add("--bidirectional", action="store_true", help="queries see later keys, too")
    add("--dtype", default="bf16", help="bf16, fp16, fp32 or fp64")
    add("--output", default=argparse.SUPPRESS, metavar="FILE", help="save the picture here (.png, .svg or .pdf)")
    verb.set_defaults(act=_explain)


def _add_check(verbs: Any) -> None:
    verb = verbs.add_parser(
        "check",
        help="is this cluster right, and how fast: versions, links, exactness, a soak (start it on every rank)",
        description="Start it on every rank: torchrun --nproc_per_node 8 -m hf_usp check, or accelerate launch -m "
        "hf_usp check. Exit code 0: right; 1: something is wrong; 2: bad input; 3: a rank hangs.",
        argument_default=argparse.SUPPRESS,
    )
    add = verb.add_argument
    add("--model", help="also run a small copy of this model: a folder, config.json, or hub name in the local cache")
    add("--cp-size", type=int, help="ranks that share a sequence (default: all)")
    add("--ulysses", type=int, help="ulysses degree to judge (default: the fewest bytes inside a node)")
    add("--heads", type=int, help="query heads without --model (default 32)")
    add("--kv-heads", type=int, help="kv heads without --model (default 8)")
    add("--head-dim", type=int, help="width of a head without --model (default 128)")
    add("--dtype", help="bf16, fp16, fp32 or fp64 (default bf16)")
    add("--ranks-per-node", type=int, help="consecutive ranks that count as a node (default: those of a host)")
    add("--soak-minutes", type=float, help="repeat the exactness check for so long (default 0)")
    add("--timeout", type=float, help="seconds after which a rank that does not finish a stage hangs (default 120)")
    add("--message", type=int, help="bytes of a large message (default 64 MiB on GPUs, 2 MiB on CPU)")
    add("--slow", type=float, help="a link is slow below this share of the usual bandwidth (default 0.5)")
    add("--output", metavar="FILE", help="write everything as JSON")
    verb.set_defaults(act=_check)


def _check(options: argparse.Namespace) -> int:
    from .check import CheckOptions, run

    return run(CheckOptions(**{name: value for name, value in vars(options).items() if name != "act"}))


def _lengths(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of lengths such as 1000,2000") from None


def _explain(options: argparse.Namespace) -> None:
    # Imported here: `hf-usp --help` and refusals of the command line need none of it.
    from .explain import Case, explain, report
    from .picture import check_output, draw

    given = vars(options)
    if "tokens" not in given and "documents" not in given:
        raise UspConfigError("neither --tokens nor --documents", rule="a row has a length", remedy="pass --tokens N")
    output = given.get("output")
    if output is not None:
        check_output(output)
    known = {field.name for field in fields(Case)}
    sizes = {name: value for name, value in given.items() if name in known}
    sizes.setdefault("tokens", sum(given.get("documents", ())))
    sizes.setdefault("kv_heads", options.heads)
    explanation = explain(Case(**sizes, causal=not options.bidirectional))
    print(report(explanation))
    if output is not None:
        draw(explanation, output)
        print(f"\npicture saved to {output}")


if __name__ == "__main__":
    sys.exit(main())
