"""Tensor parallelism of Transformers (`DistributedConfig`) around the mesh: what of it is refused."""

from __future__ import annotations

from transformers import PreTrainedModel

from .errors import UspModelError


def check_tensor_parallel(model: PreTrainedModel) -> None:
    """Refuse tensor parallelism that leaves parts of a head on a rank; layers would fail on their shapes."""
    ranks, config = getattr(model, "tp_size", None) or 1, model.config.get_text_config()
    for name in ("num_attention_heads", "num_key_value_heads"):
        count = getattr(config, name, None)
        if ranks > 1 and isinstance(count, int) and count % ranks:
            raise UspModelError(
                f"{type(model).__name__} with {name}={count} under tp_size={ranks}",
                rule="tensor parallelism gives every rank whole heads; what is left of them may be dealt unevenly to "
                "ulysses ranks",
                remedy=f"choose a tp_size that divides {count}, and more ranks for cp_size",
            )
