"""`hf-usp explain`: its numbers against the formulas, its words, its picture, its refusals."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hf_usp.batch.layout import make_layout
from hf_usp.distributed.mesh import UspMesh
from hf_usp.sharding.degrees import ring_bytes, ulysses_bytes
from hf_usp.sharding.masks import Documents
from hf_usp.tools.cli import main
from hf_usp.tools.explain.numbers import Case, Explanation, explain, messages
from hf_usp.tools.explain.text import report

ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}


def unit(case: Case) -> int:
    """u: one head of the local share, in bytes (bf16)."""
    return case.batch * case.tokens // case.ranks * case.head_dim * 2


@pytest.mark.parametrize("ulysses", [1, 2, 4, 8])
@pytest.mark.parametrize(("heads", "kv_heads"), [(32, 8), (8, 8), (16, 4), (8, 1)])
def test_bytes_of_an_even_causal_zigzag_are_the_floors(ulysses: int, heads: int, kv_heads: int) -> None:
    case = Case(tokens=4096, ranks=8, heads=heads, kv_heads=kv_heads, ulysses=ulysses, order="zigzag", batch=2)
    it = explain(case)
    assert it.traffic.ring.sum() == 8 * ring_bytes(kv_heads, ulysses, 8 // ulysses) * unit(case)
    assert (it.traffic.ulysses.sum(axis=1) == ulysses_bytes(heads, kv_heads, ulysses) * unit(case)).all()
    # Nobody sends to itself; ulysses stays inside a ring rank, the ring inside a ulysses rank.
    sender, receiver = np.indices((8, 8))
    assert not it.traffic.ring[(sender % ulysses != receiver % ulysses) | (sender == receiver)].any()
    assert not it.traffic.ulysses[(sender // ulysses != receiver // ulysses) | (sender == receiver)].any()


@pytest.mark.parametrize(("heads", "kv_heads", "ulysses"), [(14, 2, 4), (9, 3, 2), (2, 1, 4), (7, 1, 4)])
def test_bytes_of_uneven_heads_by_hand(heads: int, kv_heads: int, ulysses: int) -> None:
    case = Case(tokens=64, ranks=ulysses, heads=heads, kv_heads=kv_heads, head_dim=16, ulysses=ulysses, dtype="fp32")
    it = explain(case)
    row = 16 * 4  # bytes of one head of one token
    tokens = 64 // ulysses
    forward = np.zeros((ulysses, ulysses), dtype=np.int64)
    for u, mine in enumerate(it.shares):
        for v, theirs in enumerate(it.shares):
            if u != v:
                # q, k and v of the heads that v keeps, then the output of u's heads for v's tokens.
                forward[u, v] = tokens * row * (theirs.num_query + 2 * theirs.num_kv) + tokens * row * mine.num_query
    assert np.array_equal(it.traffic.ulysses_forward, forward)
    assert np.array_equal(it.traffic.ulysses_backward, forward.T), "gradients go the same ways back"


def test_gradients_go_home_where_keys_came_from() -> None:
    it = explain(Case(tokens=4096, ranks=4, heads=8, kv_heads=2, ulysses=1, window=512))
    assert it.layout.order == "contiguous"
    row = 2 * 2 * 128 * 2
    halo = np.zeros((4, 4), dtype=np.int64)
    halo[[0, 1, 2], [1, 2, 3]] = 511 * row
    assert np.array_equal(it.traffic.ring_forward, halo)
    assert np.array_equal(it.traffic.ring_backward, halo + halo.T)
    assert [messages(plan, 1) for plan in it.plans] == [(2, 0), (3, 0), (3, 0), (1, 0)]


def test_documents_aligned_with_shards_move_nothing() -> None:
    it = explain(
        Case(tokens=4096, ranks=4, heads=8, kv_heads=2, ulysses=1, documents=(512, 512, 1024, 2048 - 1024, 1024))
    )
    assert it.traffic.ring.sum() == 0
    assert "ring 0 B" in report(it)


def areas(it: Explanation) -> list[int]:
    return [plan.area for plan in it.plans]


def test_both_directions_see_everything_and_chunks_see_chunks() -> None:
    assert sum(areas(explain(Case(tokens=1024, ranks=4, heads=4, kv_heads=4, ulysses=1, causal=False)))) == 1024**2
    chunked = explain(Case(tokens=1024, ranks=2, heads=4, kv_heads=4, ulysses=1, chunk=128))
    assert sum(areas(chunked)) == 8 * 128 * 129 // 2


def test_the_report_says_degrees_tokens_steps_balance_bytes_and_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = "--tokens 65536 --ranks 8 --heads 32 --kv-heads 8 --ulysses 2 --order zigzag"
    assert main(["explain", *sizes.split()]) == 0
    text = capsys.readouterr().out
    for expected in (
        "ulysses 2 x ring 4",
        "contiguous: work 57.1%, with waiting 57.1%; zigzag: work 100.0%, with waiting 100.0%",
        "16 query and 4 kv heads on every ulysses rank",
        "rank 7 (ring 3, ulysses 1): 32768-40959",
        "balance (mean / max area of the mask): 100.0%",
        "from 2: 1 tile(s), 25%",
        "all ranks: ring 1.7 GiB = 0.75 of the unpruned 2.2 GiB",
        "ulysses 160.0 MiB = 1.00 of the least possible; 9 message(s), 4 all-to-all(s)",
        "on this machine's cpu: cpu_flash, the first choice on this device",
    ):
        assert expected in text, expected


def test_queries_that_select_their_keys(capsys: pytest.CaptureFixture[str]) -> None:
    """DeepSeek-V3.2 at 128K tokens on 8 ranks: 176 MiB are gathered, 7 / 8 of which come from others."""
    arguments = "explain --tokens 131072 --ranks 8 --heads 128 --selected 2048"
    assert main(arguments.split()) == 0
    said = capsys.readouterr().out
    mib = 16384 * 7 * (576 + 128) * 2 / 2**20
    assert f"forward {mib:.1f} MiB" in said and mib * 8 / 7 == 176
    assert f"backward {16384 * 7 * 576 * 2 / 2**20:.1f} MiB" in said
    attended = 2048 * 2049 // 2 + (131072 - 2048) * 2048
    assert f"{attended:,} (query, key) pairs a head" in said and f"{131072 * 131073 // 2:,} pairs scored" in said
    assert main("explain --documents 2048,1000 --ranks 2 --heads 4 --selected 2048".split()) == 0
    assert "nothing is selected" in capsys.readouterr().out


def test_the_degrees_are_chosen_with_a_reason_and_inside_a_node(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = "--tokens 65536 --ranks 16 --heads 32 --kv-heads 8 --ranks-per-node 4"
    assert main(["explain", *sizes.split()]) == 0
    assert re.search(r"ulysses (4|2|1) x ring \d+ moves [\d.]+ u per rank", capsys.readouterr().out)
    assert main(["explain", *sizes.split(), "--ulysses", "8"]) == 0
    assert "cross the edges of nodes of 4 ranks" in capsys.readouterr().out


def test_the_steps_are_in_the_order_of_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    """Rank 0 of two nodes of four: the other node first. On one node, or under a window: the order of ranks."""
    sizes = "explain --tokens 4096 --ranks 8 --heads 8 --ulysses 2 --order zigzag"
    for more, order in (("--ranks-per-node 4", "0231"), ("", "0321"), ("--ranks-per-node 4 --window 99", "0321")):
        assert main([*sizes.split(), *more.split()]) == 0
        (line,) = re.findall("ring rank 0, .*", capsys.readouterr().out)
        assert re.findall(r"from (\d)", line) == list(order), more


def test_uneven_heads_and_padding_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = "--document-lengths 1000,2000,501 --ranks 4 --heads 14 --kv-heads 2 --ulysses 4"
    assert main(["explain", *sizes.split()]) == 0
    text = capsys.readouterr().out
    assert "uneven" in text and "ulysses rank 1: query 4-7, kv 0-1" in text
    assert "padded from 3,501 to 3,504" in text and "3 documents a row" in text


def test_more_ranks_than_heads_or_tokens_still_explain(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("explain --tokens 3 --ranks 8 --heads 2 --ulysses 4".split()) == 0
    assert "ulysses rank 3: none" in capsys.readouterr().out


def test_hundreds_of_ranks_are_not_all_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("explain --tokens 65536 --ranks 128 --heads 8 --window 64".split()) == 0
    assert "... and 64 more ranks" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("causal.png", "--tokens 4096 --ranks 8 --heads 8 --kv-heads 4 --ulysses 2"),
        ("packed.svg", "--documents 700,300,24 --ranks 2 --heads 4 --window 200 --batch 2"),
        ("many.png", "--tokens 4096 --ranks 24 --heads 8 --ulysses 1"),
        ("alone.pdf", "--tokens 100 --ranks 1 --heads 1"),
    ],
)
def test_the_picture_is_saved(name: str, sizes: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / name
    assert main(["explain", *sizes.split(), "--output", str(path)]) == 0
    assert f"picture saved to {path}" in capsys.readouterr().out
    assert path.read_bytes()[:4] == {".png": b"\x89PNG", ".svg": b"<?xm", ".pdf": b"%PDF"}[path.suffix]


def test_the_picture_shows_the_mask_in_the_owners_colours(tmp_path: Path) -> None:
    from matplotlib import colormaps, image

    sizes = "--tokens 4096 --ranks 4 --heads 8 --ulysses 1 --order contiguous"
    assert main(["explain", *sizes.split(), "--output", str(tmp_path / "mask.png")]) == 0
    pixels = image.imread(tmp_path / "mask.png")[..., :3]
    left = pixels[:, : pixels.shape[1] // 3]  # the mask's panel
    shares = []
    for colour in colormaps["tab10"].colors[:4]:  # type: ignore[attr-defined]
        shares.append(float((np.abs(left - np.array(colour)) < 0.01).all(axis=-1).sum()))
    # Contiguous shards: every rank's own keys are a triangle of the same size.
    assert min(shares) > 0.9 * max(shares) > 1000


BASE = ["explain", "--tokens", "4096", "--ranks", "4", "--heads", "8", "--kv-heads", "4"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--ulysses", "3"], "choose ulysses_degree from 1, 2, 4"),
        (["--ulysses", "0"], "ulysses_degree=0"),
        (["--kv-heads", "3"], "8 query heads over 3 kv heads"),
        (["--order", "spiral"], "sequence_order='spiral'"),
        (["--dtype", "fp8"], "fp8"),
        (["--tokens", "0"], "tokens=0"),
        (["--tokens", "99999999999"], "up to 67,108,864 in all"),
        (["--ranks", "0"], "ranks=0"),
        (["--heads", "-8"], "heads=-8"),
        (["--batch", "0"], "batch=0"),
        (["--window", "0"], "window=0"),
        (["--chunk", "0"], "chunk=0"),
        (["--ranks-per-node", "0"], "ranks_per_node=0"),
        (["--documents", "1000,2000"], "3000 in all, in rows of 4096"),
        (["--documents", "4096,0"], "every document has a token"),
        (["--output", "picture.jpeg"], ".png, .svg, .pdf"),
        (["--output", "no/such/folder/picture.png"], "its folder exists"),
    ],
)
def test_bad_input_is_one_message_and_status_2(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*BASE, *arguments]) == 2
    captured = capsys.readouterr()
    assert expected in captured.err and captured.err.startswith("hf-usp: usp: ") and captured.err.count("\n") == 1
    assert captured.out == "", "refused before anything is printed"


def test_neither_tokens_nor_documents(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("explain --ranks 4 --heads 8".split()) == 2
    assert "--documents" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--documents", "1,x"], ["--tokens", "many"], ["--unknown"]])
def test_what_is_no_number_is_refused_by_the_parser(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*BASE, *arguments])
    assert stop.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_a_picture_needs_matplotlib(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main([*BASE, "--output", "picture.png"]) == 2
    assert "pip install 'hf_usp[plot]'" in capsys.readouterr().err


@pytest.mark.timeout(120)
def test_the_installed_command_refuses_without_a_traceback() -> None:
    command = [sys.executable, "-c", "import sys; from hf_usp.tools.cli import main; sys.exit(main())"]
    result = subprocess.run(
        [*command, *BASE, "--ulysses", "3"], capture_output=True, text=True, timeout=100, check=False, env=ENVIRONMENT
    )
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "ulysses_degree=3" in result.stderr


@pytest.mark.timeout(120)
def test_help_imports_neither_matplotlib_nor_the_explanation() -> None:
    probe = (
        "import sys; from hf_usp.tools.cli import main\n"
        "try: main(['explain', '--help'])\n"
        "except SystemExit: pass\n"
        "loaded = {'matplotlib', 'hf_usp.tools.explain.numbers', 'hf_usp.tools.explain.plot'} & set(sys.modules)\n"
        "sys.exit(f'loaded {loaded}' if loaded else 0)"
    )
    result = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, timeout=100, check=False, env=ENVIRONMENT
    )
    assert result.returncode == 0, result.stderr
    assert "--ranks-per-node" in result.stdout


@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize(("ulysses", "ring"), [(2, 2), (1, 4), (4, 1)])
def test_explained_bytes_are_those_that_the_benchmark_predicts_and_counts(
    ulysses: int, ring: int, window: int | None
) -> None:
    """`tests/attention/test_counts.py` holds the benchmark's prediction against what really crosses the wire."""
    import attention as benchmark

    case = Case(
        tokens=2048,
        ranks=4,
        heads=benchmark.HEADS,
        kv_heads=benchmark.KV_HEADS,
        head_dim=benchmark.WIDTH,
        ulysses=ulysses,
        window=window,
        dtype="fp32",
    )
    it = explain(case)
    for rank in range(4):
        mesh = UspMesh(ring, ulysses, *divmod(rank, ulysses), tuple(range(4)), None, None, None)
        layout = make_layout(Documents.from_bounds([0, 2048]), 1, 2048, mesh, "auto", (case.mask_spec,))
        predicted = benchmark.predict(layout, case.mask_spec, 4)
        forward = it.traffic.ring_forward + it.traffic.ulysses_forward
        backward = it.traffic.ring_backward + it.traffic.ulysses_backward
        assert [forward[rank].sum(), backward[rank].sum()] == [predicted["wire_forward"], predicted["wire_backward"]]
        hops, exchanges = messages(it.plans[rank // ulysses], ulysses)
        assert hops == predicted["messages"] + predicted["messages_backward"]
        assert exchanges == 2 * predicted["all_to_alls"]
