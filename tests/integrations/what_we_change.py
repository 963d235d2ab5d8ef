"""docs/what-we-change.md, from the two tables of changes. `python -m tests.integrations.what_we_change` writes it."""

from __future__ import annotations

from pathlib import Path

from hf_usp.integrations.accelerate import ACCELERATOR_CHANGES
from hf_usp.integrations.transformers import MODEL_CHANGES

PAGE = Path(__file__).parents[2] / "docs" / "what-we-change.md"
HEAD = """# hf_usp changes these objects

`python -m tests.integrations.what_we_change` writes this page from `MODEL_CHANGES`
(`hf_usp/integrations/transformers.py`) and `ACCELERATOR_CHANGES` (`hf_usp/integrations/accelerate.py`).

Nothing in torch, Transformers, Accelerate or any other library stays patched globally; one function of TRL is ours
while a trainer scores completions (below). Importing hf_usp registers the name `"usp"` with `AttentionInterface` and
`AttentionMaskInterface`, and the operators `torch.ops.hf_usp.*`. The first device mesh of a process sets
`sys.excepthook`: an exception that ends this rank is told to the others, then the hook that was there before is called.

`print(hf_usp.describe(model))` prints the traits of a model and the changes that are in place.

## On a model

`hf_usp.apply_context_parallel(model, mesh)`, which `Accelerator.prepare` calls, makes these changes in this order.
`hf_usp.remove_context_parallel(model)` takes all of them back.

| on | changed | why |
|---|---|---|
"""
MIDDLE = """
## On an `Accelerator`

hf_usp replaces these instance attributes of an `Accelerator(parallelism_config=UspParallelismConfig(...))`. Other
accelerators, and the class, are untouched. `hf_usp.remove_context_parallel(accelerator)` restores them. It also
restores what the accelerator has prepared: samplers, `worker_init_fn` and datasets of data loaders, `step` of
schedulers. Of a TRL trainer that compares rewards it restores `_generate_and_score_completions` and
`_calculate_rewards`. While the first of these runs, and only then, `nanstd` of the modules that define it is ours.
Of OnlineDPO it is `_calculate_rewards_from_functions`; of SDPO `_prepare_training_batch`, and while that runs, and only
then, `gather_object` of its module is ours and the accelerator's `process_index` is the number of the group.

| attribute | replacement | why | upstream |
|---|---|---|---|
"""


def render() -> str:
    """The whole page."""
    models = "".join(f"| {change.target} | {change.what} | {change.why} |\n" for change in MODEL_CHANGES)
    accelerators = "".join(f"| `{name}` | {' | '.join(change)} |\n" for name, change in ACCELERATOR_CHANGES.items())
    return HEAD + models + MIDDLE + accelerators


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
