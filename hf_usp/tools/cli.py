"""The command `hf-usp`: `plan` chooses degrees, `check` judges a cluster, `explain` says what a run would do.

hf-usp plan --model Qwen/Qwen3-8B --tokens 131072 --gpus 16 --machine h100-nvlink
torchrun --nproc_per_node 8 -m hf_usp check --output check.json
hf-usp explain --tokens 65536 --ranks 8 --heads 32 --kv-heads 8 --output explain.png
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from ..errors import UspConfigError, UspError, printable
from ..utils.validation import check_writable

BAD_INPUT = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status. Bad input is one message on standard error and status 2."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.act(options) or 0)
    except UspError as refusal:
        print(f"hf-usp: {refusal}", file=sys.stderr)
        return BAD_INPUT
    except OSError as problem:  # a disk that is full, say: that files can be opened was seen before
        print(printable(f"hf-usp: usp: a result could not be written: {problem}"), file=sys.stderr)
        return BAD_INPUT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "hf-usp", description="Sequence parallelism for Hugging Face models (ulysses x ring)."
    )
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    _add_explain(verbs)
    _add_check(verbs)
    _add_plan(verbs)
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
    add(
        "--ranks-per-node",
        type=int,
        default=argparse.SUPPRESS,
        help="a node: ulysses stays inside it, ring steps between nodes come first (default: one node)",
    )
    add("--order", default="auto", help="auto, contiguous or zigzag")
    add("--window", type=int, default=argparse.SUPPRESS, help="keys that a query sees, itself included (default: all)")
    add("--chunk", type=int, default=argparse.SUPPRESS, help="size of chunks that see only themselves (default: none)")
    add(
        "--documents",
        "--document-lengths",
        type=_lengths,
        default=argparse.SUPPRESS,
        metavar="N,N,...",
        help="lengths of the documents packed in every row (default: one)",
    )
    add(
        "--dataset",
        default=argparse.SUPPRESS,
        metavar="FILE",
        help="JSON lines with input_ids: explain its first batch",
    )
    add("--batch", type=int, default=1, help="rows")
    add(
        "--selected",
        type=int,
        default=argparse.SUPPRESS,
        help="keys that a query selects at most, by an indexer (index_topk; default: it attends to all that it sees)",
    )
    add("--gathered-width", type=int, default=576, help="with --selected: numbers of a token that are gathered")
    add("--index-width", type=int, default=128, help="with --selected: width of an index key")
    add("--index-heads", type=int, default=64, help="with --selected: heads of the indexer")
    add("--bidirectional", action="store_true", help="queries see later keys, too")
    add("--dtype", default="bf16", help="bf16, fp16, fp32 or fp64")
    add("--output", default=argparse.SUPPRESS, metavar="FILE", help="save it here (.html: a page; .png, .svg, .pdf)")
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


def _add_plan(verbs: Any) -> None:
    verb = verbs.add_parser(
        "plan",
        help="which degrees, will it fit, how fast: all splits of the ranks, ranked",
        description="Rank every legal split into tensor, ulysses, ring and data parallelism by predicted tokens a "
        "second, with memory by kind; print the best as a table and an Accelerate config.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add, none = verb.add_argument, argparse.SUPPRESS
    add("--model", required=True, help="a folder, config.json, or hub name in the local cache")
    add("--tokens", type=int, required=True, help="tokens of a row")
    add("--gpus", type=int, required=True, help="all of them")
    add("--machine", default="h100-nvlink", help="a preset (an unknown name lists them), or the file of hf-usp check")
    add("--gpus-per-node", type=int, default=none, help="default: the machine's")
    add("--memory", type=float, default=none, metavar="GB", help="of one GPU (default: the machine's)")
    add("--host-memory", type=float, default=none, metavar="GB", help="of one node (default: the machine's)")
    add("--kernel", default=none, help="attention kernel: fa2, fa3, fa4 or cudnn (default: the machine's first)")
    add("--optimizer", default="fp32", help="state of AdamW: fp32, bf16, or cpu (weights and state in host memory)")
    add("--rows", type=int, default=1, help="rows of a data-parallel replica in one step")
    add("--documents", type=_lengths, default=none, metavar="N,N,...", help="lengths that rows are packed from")
    add("--tp", type=int, default=none, help="largest tensor-parallel size (default: a node)")
    add("--offload", action="store_true", help="consider checkpoints in host memory, too")
    add("--mlp-chunk-size", type=int, default=none, metavar="N", help="consider MLPs in chunks of N tokens, too")
    add("--layer-chunk-size", type=int, default=none, metavar="N", help="consider layers in chunks of N tokens, too")
    add("--auto", action="store_true", help="consider what memory='auto' chooses from, and nothing else")
    add("--accumulate", action="store_true", help="gradients of several steps are added up: they are never freed")
    add("--simulate", action="store_true", help="run the best split's step at its real size without memory: live bytes")
    add("--config", default=none, metavar="FILE", help="save the Accelerate config here (.yaml)")
    add("--picture", default=none, metavar="FILE", help="save memory against length here (.png, .svg or .pdf)")
    add("--json", action="store_true", help="print JSON and nothing else")
    verb.set_defaults(act=_plan)


def _plan(options: argparse.Namespace) -> None:
    import json
    from pathlib import Path

    from ..planner import ranked, request
    from ..planner.search import check_possible
    from ..planner.text import accelerate_config, as_json, table

    given = vars(options)
    what = request(
        options.model,
        tokens=options.tokens,
        gpus=options.gpus,
        machine=options.machine,
        rows=options.rows,
        gpus_per_node=given.get("gpus_per_node"),
        memory_gb=given.get("memory"),
        host_memory_gb=given.get("host_memory"),
        kernel=given.get("kernel"),
        optimizer=options.optimizer,
        most_tp=given.get("tp"),
        documents=given.get("documents", ()),
        allow_offload=options.offload,
        accumulate=options.accumulate,
        mlp_chunk_size=given.get("mlp_chunk_size"),
        layer_chunk_size=given.get("layer_chunk_size"),
        auto=options.auto,
    )
    config, picture = given.get("config"), given.get("picture")
    if picture is not None:
        from .explain.plot import check_output

        check_output(picture)
    if config is not None:
        check_writable(config)
        if not config.isprintable():  # the file begins with the launch line, a comment, in which it stands
            raise UspConfigError(
                f"--config {config!r}",
                rule="its name stands in the launch line",
                remedy="choose a name without line breaks and control characters",
            )
    found = ranked(what)
    check_possible(what, found)
    yaml = accelerate_config(what, found[0], config or "plan.yaml")
    simulated, told = {}, ""
    if options.simulate:
        from ..planner.request import read_config
        from .simulate import as_bytes, report, simulate

        live = simulate(read_config(options.model), found[0].degrees, found[0].job)
        simulated, told = {"simulated": as_bytes(live)}, f"\n{report(live)}\n"
    text = json.dumps(as_json(what, found) | simulated, indent=1)
    text = text if options.json else f"{table(what, found)}\n{told}\n{yaml}"
    print(printable(text))
    if config is not None:
        Path(config).write_text(yaml, encoding="utf-8")
    if picture is not None:
        from ..planner.plot import draw_memory

        draw_memory(what, found[0], picture)


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
    from .explain.numbers import Case, explain
    from .explain.page import write_page
    from .explain.plot import check_output, draw
    from .explain.text import report

    given = vars(options)
    if "dataset" in given:
        from .explain.first_batch import documents_of

        given["documents"] = documents_of(given["dataset"], given.get("tokens"))
        given["tokens"] = sum(given["documents"])
    if "tokens" not in given and "documents" not in given:
        raise UspConfigError("neither --tokens nor --documents", rule="a row has a length", remedy="pass --tokens N")
    output = given.get("output")
    page = output is not None and output.endswith(".html")
    if page:
        check_writable(str(output))
    elif output is not None:
        check_output(output)
    known = {field.name for field in fields(Case)}
    sizes = {name: value for name, value in given.items() if name in known}
    sizes.setdefault("tokens", sum(given.get("documents", ())))
    sizes.setdefault("kv_heads", options.heads)
    explanation = explain(Case(**sizes, causal=not options.bidirectional))
    print(printable(report(explanation)))
    if output is not None:
        if page:
            write_page(explanation, output)
        else:
            draw(explanation, output)
        print(printable(f"\npicture saved to {output}"))


if __name__ == "__main__":
    sys.exit(main())
