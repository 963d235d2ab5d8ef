"""A Transformers model as sharding its sequences sees it: found once, by `inspect_model`, and frozen.

Most traits show in the model's code and configuration. Four show only when the model runs: `selfcheck.check.measure`
finds them with a few short forwards, before the first sharded batch. `UspParallelismConfig(self_check=False)` switches
off the verdict of the self-check, never a measurement: it changes no number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..batch.layout import MaskSpec
from .backbone import Backbone, find_backbone, mask_specs
from .positions import length_dependent_ropes, own_positions, temperature_tuned
from .recurrent_layers import has_recurrent_layers


@dataclass(frozen=True)
class MeasuredTraits:
    """Traits that show only when a model runs. The default of each is what is safe to assume of an unknown model.

    Attributes:
        keeps_documents_apart: documents told apart by restarting position_ids alone do not see each other.
        counts_visible_tokens: without position_ids, positions count the tokens that attention_mask shows (OPT).
        knows_left_padding: rows padded on the left, without position_ids, are computed as one process does.
        continues_from_states: the kernels of recurrent layers continue from a state that they are given.
    """

    keeps_documents_apart: bool = False
    counts_visible_tokens: bool = False
    knows_left_padding: bool = False
    continues_from_states: bool = False


@dataclass(frozen=True, eq=False)
class ModelTraits:
    """All that hf_usp asks about a model.

    Attributes:
        backbone: the module whose inputs are sharded, and whether a head around it needs full hidden states.
        own_positions: how the model counts positions where no position_ids are passed; None: 0, 1, 2 ...
        length_dependent_rope: a rotary embedding looks at the largest position ("dynamic", "longrope").
        temperature_tuning: attention layers scale queries by positions that they count themselves (Llama 4).
        recurrent: some layer has a state along the sequence.
        mask_specs: the masks of the layers, one entry a layer; they decide sequence_order="auto".
        measured: traits that show only when the model runs; None before its first sharded batch.
    """

    backbone: Backbone
    own_positions: Callable[[Mapping[str, Any]], Tensor] | None
    length_dependent_rope: bool
    temperature_tuning: bool
    recurrent: bool
    mask_specs: tuple[MaskSpec, ...]
    measured: MeasuredTraits | None = None

    def lines(self) -> list[str]:
        """One line a trait, for `hf_usp.describe`."""
        windows = sorted({spec.window_left + 1 for spec in self.mask_specs if spec.window_left >= 0})
        found = {
            "sharded at": type(self.backbone.module).__name__,
            "loss": "a sum over tokens" if self.backbone.token_loss else "of the head, on full hidden states",
            "sliding windows": ", ".join(map(str, windows)) or "none",
            "recurrent layers": _yes(self.recurrent),
            "rotary embedding depends on the length": _yes(self.length_dependent_rope),
            "counts positions itself": _yes(self.own_positions is not None),
            "scales queries by position": _yes(self.temperature_tuning),
        }
        if self.measured is None:
            found["measured"] = "at the first sharded batch"
        else:
            found |= {name.replace("_", " "): _yes(value) for name, value in asdict(self.measured).items()}
        return [f"{name}: {value}" for name, value in found.items()]


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def inspect_model(model: PreTrainedModel) -> ModelTraits:
    """The traits of a model that show without running it."""
    return ModelTraits(
        backbone=find_backbone(model),
        own_positions=own_positions(model),
        length_dependent_rope=bool(length_dependent_ropes(model)),
        temperature_tuning=bool(temperature_tuned(model)),
        recurrent=has_recurrent_layers(model),
        mask_specs=mask_specs(model),
    )
