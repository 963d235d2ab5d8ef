"""Architectures of which the census cannot say exact or refused, each with the outcome and the reason.

None of them trains with wrong numbers: they cannot be built here, or raise an error that is not ours.
"""

from __future__ import annotations

from .verdict import CRASH, UNBUILT, UNRUN

_DRAFTS = "drafts from the keys of another model; its configuration alone does not build or run"
_COMPOSITE = "Transformers does not build a causal LM from the configuration of the whole"
_CLASSES = "Transformers looks its attention class up by name and raises KeyError: 'usp' when the model is built"

LISTED: dict[str, tuple[str, str]] = {
    "falcon": (CRASH, _CLASSES),
    "gemma3n": (UNBUILT, "its vision tower needs the package timm; the text model is gemma3n_text"),
    "gemma4_assistant": (UNBUILT, _DRAFTS),
    "gemma4_unified_assistant": (UNRUN, _DRAFTS),
    "git": (CRASH, _CLASSES),
    "gpt_neo": (CRASH, _CLASSES),
    "musicgen": (UNBUILT, _COMPOSITE),
    "musicgen_melody": (UNBUILT, _COMPOSITE),
}
