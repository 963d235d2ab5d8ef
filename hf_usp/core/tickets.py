"""Tickets: tensors that carry the layout of a batch to where only tensors go, such as an operator in a compiled graph.

A ticket is a tensor of one number with the layout as an attribute. A graph takes it in like any other tensor: another
batch is another value, not another graph, and what the backward gets is the ticket of its own forward. Torch keeps
the Python object of a tensor, attributes included, as long as the tensor lives.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..batch import Layout
from ..errors import UspModelError

ATTRIBUTE = "usp_layout"


def make_ticket(layout: Layout) -> Tensor:
    """A ticket for this layout, on the CPU.

    The layout does not hold its tickets: it would then live until Python looks for cycles.
    """
    ticket = torch.zeros(1, dtype=torch.int64, device="cpu")
    setattr(ticket, ATTRIBUTE, layout)
    return ticket


def layout_of(ticket: Tensor) -> Layout:
    """The layout that a ticket carries. Copies of a ticket carry none: they are refused with a `UspModelError`."""
    layout = getattr(ticket, ATTRIBUTE, None)
    if isinstance(layout, Layout):
        return layout
    raise UspModelError(
        "an attention that gets a copy of the tensor which carries the layout of the batch",
        rule="what travels with a batch is passed on as it is",
        remedy="compile without CUDA graphs (no mode='reduce-overhead' or 'max-autotune') and without hooks that copy "
        "saved tensors, or leave out torch.compile",
    )
