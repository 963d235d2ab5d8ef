"""Fine-tune a causal language model on long text, one sequence spread over many processes.

One process, SmolLM2-135M, 4,096 tokens a step (about 45 s a step on 2 CPU cores, loss 2.2 to 2.4):

    python scripts/finetune.py --model_name_or_path models/SmolLM2-135M-Instruct --train_file book.txt \
        --sequence_length 4096 --max_steps 3 --logging_steps 1 --use_cpu --output_dir runs/one

The same steps and losses on 4 processes, ulysses 2 x ring 2 (the same time: they share the 2 cores):

    accelerate launch --config_file configs/cpu_4_processes.yaml scripts/finetune.py ...the flags above... \
        --context-parallel-size 4 --context-parallel-algo hybrid_cp_algo --ulysses-degree-in-cp 2

A run that was cut off: the same flags with --resume_from_checkpoint last, on any number of processes.
8 GPUs: the first lines of configs/one_node_8_gpus_fsdp2.yaml. All flags: python scripts/finetune.py --help.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass, field, replace
from typing import Any

import packing
import quiet  # noqa: F401
import texts
from degrees import ContextParallelArguments
from ending import end_process_groups
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hf_usp.callbacks import UspMetricsCallback, checkpoint
from hf_usp.callbacks.resume import ResumeGuard
from hf_usp.errors import UspConfigError
from hf_usp.models.backbone import accepts_any_keyword
from hf_usp.planner.request import read_config
from hf_usp.utils.validation import check_folder

logger = logging.getLogger("finetune")

DTYPES = ("float32", "bfloat16", "float16", "auto")


@dataclass
class ModelArguments:
    model_name_or_path: str | None = field(default=None, metadata={"help": "Pretrained model: a folder or a hub name."})
    config_name: str | None = field(default=None, metadata={"help": "A config.json: a fresh model of this shape."})
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Default: the model's. 'bytes': no tokenizer, ids 0 to 256."}
    )
    dtype: str = field(default="float32", metadata={"help": "Of the weights: float32, bfloat16, float16 or auto."})
    rope_parameters: str | None = field(
        default=None,
        metadata={"help": 'JSON for rope_parameters of the model\'s config: \'{"rope_type": "yarn", "factor": 32}\'.'},
    )

    def __post_init__(self) -> None:
        if (self.model_name_or_path is None) == (self.config_name is None):
            raise UspConfigError(
                f"--model_name_or_path {self.model_name_or_path} and --config_name {self.config_name}",
                rule="a run has one of the two: a pretrained model, or the shape of a fresh one",
                remedy="pass --model_name_or_path to go on from its weights, or --config_name to start from none",
            )
        if self.dtype not in DTYPES:
            raise UspConfigError(
                f"--dtype {self.dtype}", rule=f"it is one of {', '.join(DTYPES)}", remedy="leave it out for float32"
            )

    @property
    def source(self) -> str:
        return self.model_name_or_path or self.config_name or ""


@dataclass
class TextArguments:
    train_file: list[str] = field(default_factory=list, metadata={"help": "UTF-8 files, patterns or folders."})
    eval_file: list[str] = field(default_factory=list, metadata={"help": "The same, for evaluation."})
    dataset_name: str | None = field(default=None, metadata={"help": "Anything datasets.load_dataset reads."})
    dataset_config: str | None = None
    dataset_split: str = "train"
    text_column: str = "text"
    sequence_length: int | None = field(
        default=None, metadata={"help": "Pack documents into rows of at most this many tokens. Default: a row each."}
    )
    streaming: bool = field(default=False, metadata={"help": "Read --dataset_name while training; needs --max_steps."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where rows are kept that all processes share."})
    preprocessing_processes: int | None = field(default=None, metadata={"help": "Processes that tokenize and pack."})

    def __post_init__(self) -> None:
        if bool(self.train_file) == bool(self.dataset_name):
            raise UspConfigError(
                f"--train_file {self.train_file} and --dataset_name {self.dataset_name}",
                rule="text comes from one of the two",
                remedy="pass --train_file with your files, or --dataset_name with what datasets.load_dataset reads",
            )
        if self.streaming and (not self.dataset_name or self.sequence_length is None):
            raise UspConfigError(
                "--streaming without --dataset_name and --sequence_length",
                rule="a stream of documents is packed into rows",
                remedy="add --dataset_name and --sequence_length, or leave out --streaming",
            )

    def documents(self) -> Any:
        """A dataset or stream of training texts, in the column `self.column`."""
        if self.train_file:
            return texts.file_documents(self.train_file)
        source = (self.dataset_name or "", self.dataset_config, self.dataset_split, self.text_column)
        return texts.dataset_documents(*source, streaming=self.streaming)

    @property
    def column(self) -> str:
        return "text" if self.train_file else self.text_column


@dataclass
class ReportArguments:
    usp_report: bool = field(
        default=True, metadata={"help": "Log tokens a second, model operations, bytes, balance and memory as usp/..."}
    )
    profile_step: int | None = field(
        default=None,
        metadata={"help": "Profile this step: its exposed communication, and a trace in the output folder."},
    )
    peak_tflops: float | None = field(
        default=None,
        metadata={"help": "Of one device in this run's dtype, 10^12 a second, for usp/mfu."},
    )

    def attach(self, trainer: Trainer) -> None:
        """The report looks on; the run is the same without it."""
        if not self.usp_report:
            return
        trace = None if self.profile_step is None else os.path.join(trainer.args.output_dir or ".", "trace")
        peak = None if self.peak_tflops is None else self.peak_tflops * 1e12
        UspMetricsCallback(trainer, peak_flops=peak, profile_step=self.profile_step, trace=trace)


def load_config(args: ModelArguments) -> Any:
    """The model's config, with the rotary embedding of --rope_parameters and rows that are `factor` times longer."""
    config = read_config(args.source, local=False)
    if args.rope_parameters is None:
        return config
    try:
        given = json.loads(args.rope_parameters)
        kind, factor = given["rope_type"], given.get("factor", 1)
        if kind not in ("default", *ROPE_INIT_FUNCTIONS):
            raise ValueError(f"Transformers knows {', '.join(ROPE_INIT_FUNCTIONS)}")
        if not isinstance(factor, int | float) or factor < 1:
            raise ValueError("the factor is a number of at least 1")
        if "rope_theta" not in (config.rope_parameters or {}):
            raise ValueError(f"{config.model_type} has none, or one for each kind of layer")
        config.rope_parameters = {"rope_theta": config.rope_parameters["rope_theta"], **given}
        config.standardize_rope_params()  # notes how long the rows of the pretrained model were
        config.max_position_embeddings = round(config.max_position_embeddings * factor)
        config.validate_rope()
    except (TypeError, ValueError, KeyError) as problem:
        raise UspConfigError(
            f"--rope_parameters {args.rope_parameters}: {problem}",
            rule="JSON that Transformers takes as rope_parameters of this model",
            remedy='for example --rope_parameters \'{"rope_type": "yarn", "factor": 4.0}\'',
        ) from problem
    return config


def load_tokenizer(args: ModelArguments) -> Any:
    """The model's own tokenizer, or plain bytes (also for a fresh model that names none)."""
    name = args.tokenizer_name or args.model_name_or_path or "bytes"
    if name == "bytes":
        return texts.ByteTokenizer()
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as problem:  # whatever its files hold
        raise UspConfigError(
            f"the tokenizer {name!r}: {type(problem).__name__}: {f'{problem} '.splitlines()[0]}",
            rule="--tokenizer_name is a folder or hub name with a tokenizer's files, or 'bytes'",
            remedy="check the name, or pass --tokenizer_name bytes",
        ) from problem


def load_model(args: ModelArguments, config: Any, split: Any) -> PreTrainedModel:
    """A pretrained or fresh model whose attention is `usp`: exact attention in one process, the mesh in several."""
    options = {"attn_implementation": "usp", "dtype": args.dtype}
    if split is not None:
        if args.model_name_or_path is None:
            raise UspConfigError(
                "--tensor-model-parallel-size with --config_name",
                rule="Transformers splits layers while it loads a pretrained model",
                remedy="save the fresh model first and pass its folder as --model_name_or_path",
            )
        options["distributed_config"] = split
    if args.model_name_or_path is not None:
        return AutoModelForCausalLM.from_pretrained(args.model_name_or_path, config=config, **options)
    if args.dtype == "auto":
        options["dtype"] = config.dtype or "float32"
    return AutoModelForCausalLM.from_config(config, **options)


def load_rows(documents: Any, tokenizer: texts.Tokenizer, args: TextArguments, column: str) -> Any:
    """Rows of at most `--sequence_length` tokens, or one per document."""
    options: dict[str, Any] = {"cache_dir": args.cache_dir, "num_proc": args.preprocessing_processes}
    rows = packing.load_rows(documents, tokenizer, args.sequence_length, column=column, **options)
    if not args.streaming:
        logger.info("%s rows of documents", f"{len(rows):,}")
    return rows


def checkpoint_to_continue(args: TrainingArguments) -> str | None:
    """`--resume_from_checkpoint last`: the newest complete one in the output folder, if any. A path must be one."""
    if args.resume_from_checkpoint is None or args.output_dir is None:
        return None
    if args.resume_from_checkpoint == "last":
        found = checkpoint.get_last_complete_checkpoint(args.output_dir)
    else:
        found = args.resume_from_checkpoint
        checkpoint.check_checkpoint_complete(found)
    logger.info("continuing from %s", found)
    return found


def main() -> None:
    kinds: Any = (ContextParallelArguments, ModelArguments, TextArguments, ReportArguments, TrainingArguments)
    parser = HfArgumentParser(kinds)
    cp, model_args, text_args, report, args = parser.parse_args_into_dataclasses()
    args.parallelism_config = cp.parallelism_config()
    if args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = False  # every weight of a causal LM is used; searching costs a walk per step
    args.remove_unused_columns = False  # the collator reads seq_lengths, which no model takes
    if text_args.streaming:
        args.accelerator_config.dispatch_batches = False  # every process reads its rows, those of a sequence the same
    logging.basicConfig(format="%(message)s")
    for name in (logger.name, "hf_usp"):
        logging.getLogger(name).setLevel(logging.INFO if args.should_log else logging.WARNING)
    set_seed(args.seed)

    config = load_config(model_args)
    check_folder(args.output_dir or ".", "--output_dir")
    if text_args.cache_dir is not None:
        check_folder(text_args.cache_dir, "--cache_dir")
    tokenizer = load_tokenizer(model_args)
    train_rows = load_rows(text_args.documents(), tokenizer, text_args, text_args.column)
    eval_rows = None
    if text_args.eval_file:
        whole_eval = replace(text_args, streaming=False)
        eval_rows = load_rows(texts.file_documents(text_args.eval_file), tokenizer, whole_eval, "text")

    if len(tokenizer) > config.vocab_size:
        raise UspConfigError(
            f"{len(tokenizer)} token ids for a vocabulary of {config.vocab_size}",
            rule="every token id is below vocab_size of the model",
            remedy="choose the model's own --tokenizer_name, or a larger vocab_size in --config_name",
        )
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    logger.info("%d processes: %s", args.world_size, cp.describe(config.num_attention_heads, kv_heads))
    model = load_model(model_args, config, cp.distributed_config())
    # Many models do not tell packed documents apart by position_ids alone.
    collator = packing.Collator(
        packed=text_args.sequence_length is not None, cu_seq_lens=accepts_any_keyword(model.forward)
    )
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        data_collator=collator,
        processing_class=None if isinstance(tokenizer, texts.ByteTokenizer) else tokenizer,
    )
    report.attach(trainer)
    trainer.add_callback(ResumeGuard())  # refuses a checkpoint of other rows, other batches or another model
    trainer.train(resume_from_checkpoint=checkpoint_to_continue(args))
    if eval_rows is not None:
        trainer.log_metrics("eval", trainer.evaluate())
    trainer.save_state()
    if args.save_strategy != "no":
        trainer.save_model()
    end_process_groups()


if __name__ == "__main__":
    main()
