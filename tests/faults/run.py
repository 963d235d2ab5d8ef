"""One rank of a small run of the stock Trainer in which one rank has a fault."""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PLACES = ("forward", "backward", "evaluation", "dataset", "optimizer", "save", "prepare")
TEXT = "boom at this place"


def rank_main(rank: int, world: int, port: int, folder: str, case: dict[str, Any]) -> None:
    """A process as a launcher starts it: output in a file, an exception that ends it through `sys.excepthook`."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
        OMP_NUM_THREADS="1",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
        HF_HUB_OFFLINE="1",
        ACCELERATE_USE_CPU="true",
    )
    output = os.open(f"{folder}/out.{rank}", os.O_CREAT | os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    code = 0
    try:
        from transformers import Trainer  # noqa: F401  takes seconds, which are not to count for a short timeout

        gather = dist.TCPStore("127.0.0.1", port, None, False, timeout=timedelta(seconds=120))
        gather.add("imported", 1)
        while gather.add("imported", 0) < world:
            time.sleep(0.05)
        train(folder, case)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def strike(folder: str, how: str) -> None:
    """The fault itself; the file says when."""
    Path(folder, "fault").write_text(str(time.time()))
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    else:
        raise RuntimeError(how if " " in how else TEXT)


def train(folder: str, case: dict[str, Any]) -> None:
    """Four steps with an evaluation and a checkpoint in the middle.

    case: place, how, rank; and, all optional: mesh (cp_size, ulysses_degree), timeout (of the process group, seconds),
    options (of the config), other (options of the config on that rank), model (settings of the model on that rank),
    args (of the Trainer on that rank), seed (of the weights on that rank), evaluate (instead of training).
    """
    from transformers import Trainer, TrainingArguments, default_data_collator

    import hf_usp

    from ..tiny import rows, tiny_model

    dist.init_process_group("gloo", timeout=timedelta(seconds=case.get("timeout", 60)))
    place, how, mine = case.get("place"), case.get("how", "raise"), dist.get_rank() == case.get("rank", 1)
    steps = [0]

    def fault(at: str, start: int = 1) -> None:
        if mine and at == place and steps[0] >= start:
            strike(folder, how)

    model = tiny_model("mistral", **(case.get("model", {}) if mine else {}))
    if mine and "seed" in case:
        torch.manual_seed(case["seed"])
        model.apply(model._init_weights)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
    layer = model.model.layers[1]
    layer.mlp.register_forward_hook(lambda m, a, o: fault("forward" if m.training else "evaluation"))
    layer.mlp.register_full_backward_hook(lambda m, a, o: fault("backward"))

    class Data(torch.utils.data.Dataset):
        made = rows(32, 33)

        def __len__(self) -> int:
            return len(self.made)

        def __getitem__(self, index: int) -> Any:
            fault("dataset")
            return self.made[index]

    degrees = dict(zip(("cp_size", "ulysses_degree"), case.get("mesh", (3, 1)), strict=True))
    parallel = degrees | case.get("options", {}) | (case.get("other", {}) if mine else {})
    settings: dict[str, Any] = {
        "output_dir": folder,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "parallelism_config": hf_usp.UspParallelismConfig(**parallel),
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "save_steps": 3,
        "eval_steps": 2,
        "eval_strategy": "steps",
        "logging_steps": 1,
        "prediction_loss_only": True,
        **(case.get("args", {}) if mine else {}),
    }
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**settings),
        train_dataset=Data(),
        eval_dataset=rows(8, 33),
        data_collator=default_data_collator,
    )
    step, save, prepare = trainer.training_step, trainer._save_rng_state, trainer.accelerator.prepare
    create = trainer.create_optimizer

    def training_step(*args: Any, **kwargs: Any) -> Any:
        steps[0] += 1
        return step(*args, **kwargs)

    def save_state(*args: Any, **kwargs: Any) -> None:
        fault("save")
        save(*args, **kwargs)

    def prepared(*args: Any, **kwargs: Any) -> Any:
        fault("prepare", 0)
        return prepare(*args, **kwargs)

    def with_optimizer(*args: Any, **kwargs: Any) -> Any:
        optimizer = create(*args, **kwargs)
        optimizer.register_step_pre_hook(lambda *a, **k: fault("optimizer"))
        return optimizer

    trainer.training_step, trainer._save_rng_state = training_step, save_state
    trainer.accelerator.prepare, trainer.create_optimizer = prepared, with_optimizer
    print(trainer.evaluate() if case.get("evaluate") else trainer.train(), "DONE", flush=True)
    dist.destroy_process_group()
    time.sleep(0.5)
