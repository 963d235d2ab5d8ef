"""scripts/finetune.py as a user starts it: one process, two processes, resumed, and with bad input."""

from __future__ import annotations

import json
from pathlib import Path

import finetune
import pytest
import torch

from hf_usp import UspConfigError

from .launch import TINY_LLAMA, alone, several, steps, succeeded, write_inputs

SCRIPT = "scripts/finetune.py"

# Eager gpt-oss does not heed restarting position_ids: packed rows are refused unless cu_seq_lens describe them as well.
# In one process it heeds neither, so its rows here hold one document and padding (no two pieces fit 130 tokens).
TINY_GPT_OSS = TINY_LLAMA | {
    "model_type": "gpt_oss",
    "head_dim": 8,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"],
}


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("rows", "algorithm", "model"),
    [
        ("--sequence_length 130 --loss-chunk-size 16", "ulysses_cp_algo", TINY_GPT_OSS),
        ('--rope_parameters {"rope_type":"yarn","factor":4}', "megatron_cp_algo", TINY_LLAMA),
    ],
    ids=["packed", "whole, yarn, memory chosen"],
)
def test_two_processes_log_the_losses_of_one(
    tmp_path: Path, rows: str, algorithm: str, model: dict[str, object]
) -> None:
    flags = [*write_inputs(tmp_path), *rows.split(), "--save_strategy", "no"]
    (tmp_path / "model.json").write_text(json.dumps(model))
    succeeded(alone(SCRIPT, *flags, "--output_dir", str(tmp_path / "one")))
    mesh = ["--context-parallel-size", "2", "--context-parallel-algo", algorithm]
    mesh += [] if "--loss-chunk-size" in rows else ["--memory", "auto"]
    printed = succeeded(several(2, SCRIPT, *flags, *mesh, "--output_dir", str(tmp_path / "two")))

    assert "FutureWarning" not in printed
    one, two = steps(tmp_path / "one"), steps(tmp_path / "two")
    assert len(one) == len(two) == 2
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
        assert (b["epoch"], b["step"]) == (a["epoch"], a["step"])
        assert a["usp/tokens_per_second"] > 0 and b["usp/gb_sent_per_step"] > 0, "the report is on by default"
    assert ("usp: memory: " in printed) == ("--memory" in mesh)
    if algorithm == "ulysses_cp_algo":
        assert "2 processes: ulysses 2 x ring 1; 3 query and 1 kv heads, split unevenly: 2 + 1" in printed


@pytest.mark.timeout(180)
def test_two_processes_continue_a_run_of_one_that_was_cut_off(tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = [*write_inputs(tmp_path), "--sequence_length", "64", "--save_steps", "1", "--max_steps", "3"]
    flags += ["--lr_scheduler_type", "constant", "--eval_file", str(tmp_path / "texts" / "a.txt")]
    flags += ["--output_dir", str(out), "--resume_from_checkpoint", "last"]
    printed = succeeded(alone(SCRIPT, *flags))
    assert "continuing from None" in printed
    assert "eval_loss" in printed
    whole = steps(out)
    (out / "checkpoint-3" / "trainer_state.json").unlink()  # as a run leaves it that is killed while it saves
    printed = succeeded(several(2, SCRIPT, *flags, "--context-parallel-size", "2"))
    assert f"continuing from {out / 'checkpoint-2'}" in printed
    assert [entry["loss"] for entry in steps(out)] == pytest.approx([entry["loss"] for entry in whole], abs=1e-5)
    assert (out / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--context-parallel-algo hybrid_cp_algo", "hybrid_cp_algo without --ulysses-degree-in-cp"),
        ("--context-parallel-size 3", "--context-parallel-size 3 with 2 processes"),
        ("--config_name model.json", "a pretrained model, or the shape of a fresh one"),
        ("--dataset_name json", "text comes from one of the two"),
        ("--streaming", "--streaming without --dataset_name"),
        ("--dtype float8", "--dtype float8.*one of float32, bfloat16, float16, auto"),
    ],
)
def test_wrong_flags_end_the_run_before_it_starts(
    tmp_path: Path, flags: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Neither the model nor the text exists, and TrainingArguments would wait for a second process.
    output = ["--output_dir", str(tmp_path / "out"), "--model_name_or_path", "none", "--train_file", "none.txt"]
    monkeypatch.setattr("sys.argv", [SCRIPT, *output, *flags.split()])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UspConfigError, match=message):
        finetune.main()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--config_name no.json", "no config of 'no.json'"),
        ("--config_name {}/broken.json", "no config that Transformers takes in"),
        ("--output_dir {}/broken.json", "--output_dir .*Remedy: name another folder with --output_dir"),
        ("--cache_dir {}/broken.json", "--cache_dir .*Remedy: name another folder with --cache_dir"),
        ("--tokenizer_name {}", "the tokenizer .*--tokenizer_name bytes"),
        ("--loss-chunk-size 0", "loss_chunk_size=0"),
        ('--rope_parameters {"rope_type":"yarn"}', "Missing required keys"),
        ('--rope_parameters {"rope_type":"yern","factor":4}', "Transformers knows linear, .*yarn"),
        ('--rope_parameters {"rope_type":"yarn","factor":0.5}', "the factor is a number of at least 1"),
        ("--rope_parameters yarn", "JSON that Transformers takes as rope_parameters"),
    ],
)
def test_what_is_not_there_ends_the_run_before_texts_are_packed(
    tmp_path: Path, flags: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = write_inputs(tmp_path)
    (tmp_path / "broken.json").write_text("{")
    monkeypatch.setattr(finetune, "load_rows", lambda *_: pytest.fail("texts were packed"))
    here = flags.replace("{}", str(tmp_path)).split()
    monkeypatch.setattr("sys.argv", [SCRIPT, *given, "--use_cpu", "--output_dir", str(tmp_path / "out"), *here])
    with pytest.raises(UspConfigError, match=message):
        finetune.main()


def test_the_rotary_embedding_of_longer_rows(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY_LLAMA))
    given = '{"rope_type": "yarn", "factor": 4.0}'
    config = finetune.load_config(finetune.ModelArguments(config_name=str(tmp_path), rope_parameters=given))
    assert config.max_position_embeddings == 4 * TINY_LLAMA["max_position_embeddings"]
    rope = {"rope_theta": 10000.0, "original_max_position_embeddings": TINY_LLAMA["max_position_embeddings"]}
    assert config.rope_parameters == {"rope_type": "yarn", "factor": 4.0, **rope}


def test_the_dtype_of_a_fresh_model_is_that_of_its_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**TINY_LLAMA, "dtype": "bfloat16"}))
    for name, kind in (("auto", torch.bfloat16), ("float32", torch.float32)):
        args = finetune.ModelArguments(config_name=str(tmp_path), dtype=name)
        config = finetune.load_config(args)
        assert finetune.load_model(args, config, None).dtype == kind


@pytest.mark.timeout(180)
def test_a_stream_of_documents(tmp_path: Path) -> None:
    flags = write_inputs(tmp_path)
    at = flags.index("--train_file")
    # Rows of 348 tokens and of 231 + 94.
    flags[at : at + 2] = ["--dataset_name", str(tmp_path / "texts"), "--streaming", "--sequence_length", "350"]
    succeeded(alone(SCRIPT, *flags, "--save_strategy", "no", "--output_dir", str(tmp_path / "one")))
    two = several(2, SCRIPT, *flags, "--context-parallel-size", "2", "--output_dir", str(tmp_path / "two"))
    succeeded(two)
    one, two = ([entry["loss"] for entry in steps(tmp_path / name)] for name in ("one", "two"))
    assert one == pytest.approx(two, abs=1e-5)
    assert len(one) == 2


@pytest.mark.timeout(180)
def test_bad_text_ends_all_processes(tmp_path: Path) -> None:
    flags = [*write_inputs(tmp_path), "--output_dir", str(tmp_path / "out"), "--context-parallel-size", "2"]
    (tmp_path / "texts" / "latin.txt").write_bytes(b"caf\xe9")
    result = several(2, SCRIPT, *flags)
    assert result.returncode != 0
    assert "latin.txt: byte 0xe9 at offset 3 is not UTF-8" in result.stdout


def test_a_vocabulary_too_small_for_the_tokenizer(tmp_path: Path) -> None:
    flags = write_inputs(tmp_path)
    (tmp_path / "model.json").write_text(json.dumps({**TINY_LLAMA, "vocab_size": 100}))
    result = alone(SCRIPT, *flags, "--output_dir", str(tmp_path / "out"))
    assert result.returncode != 0
    assert "257 token ids for a vocabulary of 100" in result.stdout
