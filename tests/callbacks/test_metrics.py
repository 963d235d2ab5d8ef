"""The training report: what stands in the Trainer's log, on a mesh and in one process, and that it changes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_usp.callbacks.counting import work_per_token
from hf_usp.callbacks.metrics import UspMetricsCallback, known_peak
from hf_usp.callbacks.overlap import length, merged
from hf_usp.errors import UspConfigError

from ..harness import fresh_accelerate, training_arguments
from ..ranks import Ranks
from ..tiny import rows, tiny_model

NAMES = {"tokens_per_second", "tflops_per_rank", "mfu", "padding_share", "peak_memory_gb"}
ON_A_MESH = {"balance", "gb_sent_per_step"}


def train(folder: str, mesh: tuple[int, int] | None, setup: dict[str, Any]) -> dict[str, Any]:
    """Train three steps with the report; what the log holds, and what a logging callback got."""
    from transformers import Trainer, TrainerCallback

    import hf_usp

    class Recorder(TrainerCallback):
        def __init__(self) -> None:
            self.logs: list[dict[str, float]] = []

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            self.logs.append(dict(logs))

    fresh_accelerate()
    config = None if mesh is None else hf_usp.UspParallelismConfig(cp_size=mesh[0], ulysses_degree=mesh[1])
    args = training_arguments(
        folder,
        save_strategy="no",
        logging_steps=2,
        max_steps=4,
        parallelism_config=config,
        gradient_accumulation_steps=2,
        eval_strategy="steps",
        eval_steps=3,
        per_device_train_batch_size=1,
        optim="sgd",
        learning_rate=0.05,
    )
    model = tiny_model(setup.get("family", "llama"), "usp" if config else "eager")
    if setup.get("checkpointing"):
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    recorder = Recorder()
    trainer = Trainer(
        model=model, args=args, train_dataset=setup["rows"], eval_dataset=rows(2, 40), callbacks=[recorder]
    )
    report = None
    if setup.get("report", True):
        report = UspMetricsCallback(
            trainer, peak_flops=1e12, profile_step=setup.get("profile"), trace=folder if setup.get("profile") else None
        )
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "history": history,
        "recorded": [entry for entry in recorder.logs if "loss" in entry],
        "others": [entry for entry in recorder.logs if "loss" not in entry],
        "work": None if report is None else report.work_per_token,
    }


def figures(entry: dict[str, float]) -> dict[str, float]:
    return {name.removeprefix("usp/"): value for name, value in entry.items() if name.startswith("usp/")}


def weights_of_products(model: Any) -> int:
    """Weights of all linear layers, written from the config of a tiny Llama."""
    c = model.config
    attention = c.hidden_size * c.head_dim * (2 * c.num_attention_heads + 2 * c.num_key_value_heads)
    return c.num_hidden_layers * (attention + 3 * c.hidden_size * c.intermediate_size) + c.hidden_size * c.vocab_size


def test_one_process_logs_speed_work_and_padding(tmp_path: Path) -> None:
    mine = train(str(tmp_path), None, {"rows": rows(8, 40)})
    assert len(mine["history"]) == 2
    for entry, recorded in zip(mine["history"], mine["recorded"], strict=True):
        got = figures(entry)
        assert got.keys() == NAMES
        assert figures(recorded) == got, "callbacks that write logs get the figures"
        assert got["padding_share"] == 0 and got["peak_memory_gb"] > 0.05
        assert got["mfu"] == pytest.approx(got["tflops_per_rank"]) and got["tokens_per_second"] > 0
        # Without a mesh only the products of weights are counted.
        work = got["tokens_per_second"] * 6 * weights_of_products(tiny_model())
        assert got["tflops_per_rank"] * 1e12 == pytest.approx(work)
    assert not any(figures(entry) for entry in mine["others"]), "evaluation and the last entry have none"


@pytest.mark.parametrize("mesh", [(4, 2), (2, 1)], ids=str)
def test_a_mesh_logs_balance_and_bytes(four_ranks: Ranks, tmp_path: Path, mesh: tuple[int, int]) -> None:
    from hf_usp.tools.explain.numbers import Case, explain

    got = four_ranks.run(train, str(tmp_path), mesh, {"rows": rows(16, 39)})
    assert len({json.dumps(r["history"]) for r in got}) == 1, "the same on every rank"
    cp, ulysses = mesh
    padded = 40
    it = explain(Case(tokens=40, ranks=cp, heads=4, kv_heads=2, head_dim=8, ulysses=ulysses, dtype="fp32"))
    # Two layers, two micro-batches a step; the padding token of ours is seen by nobody, which may save a row.
    sent = (it.traffic.ring + it.traffic.ulysses).sum(axis=1).max() * 2 * 2
    for entry in got[0]["history"]:
        f = figures(entry)
        assert f.keys() == NAMES | ON_A_MESH
        assert f["padding_share"] == pytest.approx(1 - 39 / padded)
        assert sent * 0.9 < f["gb_sent_per_step"] * 1e9 <= sent
        assert 1 <= f["balance"] < 1.1
        pairs = 39 * 40 / 2 * 4 * (8 + 8) * 2  # query-key pairs x heads x widths x layers of a row
        work = f["tokens_per_second"] * (6 * weights_of_products(tiny_model()) + 6 * pairs / 39) / 4
        assert f["tflops_per_rank"] * 1e12 == pytest.approx(work)


def test_recomputed_layers_send_again(four_ranks: Ranks, tmp_path: Path) -> None:
    plain, again = (
        four_ranks.run(train, str(tmp_path), (4, 4), {"rows": rows(16, 40), "checkpointing": on})[0]["history"][0]
        for on in (False, True)
    )
    # Pure ulysses sends as much forward as backward.
    assert again["usp/gb_sent_per_step"] == pytest.approx(1.5 * plain["usp/gb_sent_per_step"])
    assert again["usp/tflops_per_rank"] / again["usp/tokens_per_second"] == pytest.approx(
        plain["usp/tflops_per_rank"] / plain["usp/tokens_per_second"]
    ), "recomputing is no model work"


def test_a_profiled_step_tells_what_waiting_costs(four_ranks: Ranks, tmp_path: Path) -> None:
    got = four_ranks.run(train, str(tmp_path), (4, 2), {"rows": rows(16, 40), "profile": 3})
    first, second = got[0]["history"]
    assert "usp/exposed_communication" not in first
    assert 0 < second["usp/exposed_communication"] < 1
    trace = (tmp_path / "step-3-rank-2.json").read_text()
    for name in ("usp.exchange", "usp.wait", "usp.tiles", "usp.merge"):
        assert name in trace


def test_the_report_changes_no_loss(four_ranks: Ranks, tmp_path: Path) -> None:
    def losses(report: bool) -> list[float]:
        setup = {"rows": rows(16, 40), "report": report}
        return [entry["loss"] for entry in four_ranks.run(train, str(tmp_path), (4, 2), setup)[0]["history"]]

    assert losses(True) == losses(False)


def test_frozen_weights_and_idle_experts_are_not_counted() -> None:
    dense = tiny_model()
    assert work_per_token(dense) == 6 * weights_of_products(dense)
    for parameter in dense.parameters():
        parameter.requires_grad = False
    assert work_per_token(dense) == 4 * weights_of_products(dense)
    tied = tiny_model(tie_word_embeddings=True)
    assert work_per_token(tied) == 6 * weights_of_products(tied), "the head's product counts, the look-up does not"
    experts = {"num_local_experts": 8, "num_experts_per_tok": 2}
    sparse, two = tiny_model("mixtral", **experts), tiny_model("mixtral", **{**experts, "num_local_experts": 2})
    router = 6 * 2 * (8 - 2) * 32  # two layers
    assert work_per_token(sparse) - router == work_per_token(two)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA L20", 119.5e12),
        ("NVIDIA Unknown 2080", None),
        ("AMD EPYC cpu", None),
    ],
)
def test_the_peak_of_known_gpus(name: str, peak: float | None) -> None:
    assert known_peak(name) == peak


def test_spans_are_counted_once() -> None:
    spans = merged([(5, 7), (0, 2), (1, 3), (6, 6.5), (3, 3)])
    assert spans == [(0, 3), (5, 7)] and length(spans) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"peak_flops": -1.0}, "peak_flops=-1.0"),
        ({"peak_flops": float("nan")}, "peak_flops=nan"),
        ({"profile_step": 0}, "profile_step=0"),
        ({"trace": "folder"}, "trace='folder' without profile_step"),
    ],
)
def test_absurd_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UspConfigError, match=message):
        UspMetricsCallback(torch.nn.Module(), **options)  # type: ignore[arg-type]
