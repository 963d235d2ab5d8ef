"""Parameters stay unchanged: those that a module's forward replaces are restored right after it.

Some modules convert their weights at a forward without gradients, one way, to what is faster in inference: other bytes
behind the same parameter, and another state beside it (4-bit weights on CPUs with bf16 instructions, for one). Training
after a check would go on with those. Other bytes and other objects are told by identity; the ones from before still
exist and return. A write into the bytes themselves shows in the version that autograd counts; the old bytes are
lost, and this is noted for a refusal. A module's forward is looked at from inside its other hooks: FSDP and ZeRO gather
and free there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ...compat import storage_identity, write_count

DEPTH = 3  # parameter (or module), what it holds, what that holds


@contextmanager
def preserve_parameters(model: nn.Module) -> Iterator[set[str]]:
    """Forwards within it leave the modules' parameters as they were; yields names of those that were overwritten."""
    overwritten: set[str] = set()
    before: dict[nn.Module, _Parameters] = {}
    handles = []

    def keep(module: nn.Module, args: Any) -> None:
        before[module] = _Parameters(module)

    def put_back(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            lost = before.pop(module).put_back()
            overwritten.update(f"{name}.{parameter}".lstrip(".") for parameter in lost)

        return hook

    for name, module in model.named_modules():
        if module._parameters:
            handles.append(module.register_forward_pre_hook(keep))
            handles.append(module.register_forward_hook(put_back(name), prepend=True))
    try:
        yield overwritten
    finally:
        for handle in handles:
            handle.remove()


class _Parameters:
    """A module's own parameters as they are now, and the Python state of the module and of what they hold."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.own = module, dict(module._parameters)
        self.named = {name: p for name, p in self.own.items() if p is not None}
        # `data` shares the bytes and keeps them.
        self.data = {name: p.data for name, p in self.named.items()}
        self.places = {name: _place(p) for name, p in self.named.items()}
        self.versions = {name: write_count(p) for name, p in self.named.items()}
        self.state = [entry for owner in (module, *self.named.values()) for entry in _attributes(owner, DEPTH)]

    def put_back(self) -> list[str]:
        """All as before, if others took the place of any; names of those whose bytes were written."""
        own = self.module._parameters
        moved = [name for name, place in self.places.items() if _place(self.named[name]) != place]
        if moved or own.keys() != self.own.keys() or any(own[name] is not p for name, p in self.own.items()):
            own.clear()
            own.update(self.own)
            for name in moved:
                self.named[name].data = self.data[name]
            for owner, attributes in self.state:
                owner.__dict__.clear()
                owner.__dict__.update(attributes)
        return [name for name, version in self.versions.items() if write_count(self.named[name]) != version]


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Which bytes a tensor shows, and how."""
    return storage_identity(tensor), tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset()


def _attributes(owner: Any, depth: int) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The attributes of an object and of the plain objects that it holds (a quantization's state, say)."""
    attributes = dict(getattr(owner, "__dict__", {}))
    if attributes:
        yield owner, attributes
    for value in attributes.values() if depth > 1 else ():
        if hasattr(value, "__dict__") and not isinstance(value, nn.Module | Tensor | type) and not callable(value):
            yield from _attributes(value, depth - 1)
