"""Bytes that are alive in a program, counted operator by operator, by phase and by what made them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..compat import TorchDispatchMode, local_part, storage_identity


@dataclass
class Phase:
    """The moment of a phase with the most bytes.

    Attributes:
        peak: bytes alive then, of what the program made.
        made: bytes by (phase, operator, dtype) that made them.
    """

    peak: int = -1
    made: dict[tuple[str, str, str], int] = field(default_factory=dict)


class LiveBytes(TorchDispatchMode):
    """Sees every operator, also inside the backward. Of DTensors the own part counts.

    Args:
        known: tensors that are there already; neither they nor their views count.
        inventory: whether `Phase.made` is filled.

    Attributes:
        phase: name of the phase at hand; set it.
        phases: phase -> its peak.
        host: bytes of all tensors that were left out.
        optimizer: bytes of the optimizer's state, for who adds it.
    """

    def __init__(self, known: Iterable[Tensor] = (), inventory: bool = True) -> None:
        super().__init__()
        self.phase, self.phases, self.inventory = "start", dict[str, Phase](), inventory
        self._known = {storage_identity(local_part(x)): local_part(x).untyped_storage() for x in known}
        self._elsewhere, self.host, self.optimizer = set[int](), 0, 0
        self._alive: dict[int, tuple[weakref.ref[torch.UntypedStorage], tuple[str, str, str]]] = {}

    @property
    def peak(self) -> int:
        """The largest of all phases."""
        return max((phase.peak for phase in self.phases.values()), default=0)

    @property
    def there(self) -> int:
        """Bytes of what is known, once where tensors share a storage."""
        return sum(storage.nbytes() for storage in self._known.values())

    def leave_out(self, tensor: Tensor) -> None:
        """A tensor does not count from now on: it lies in host memory."""
        place = storage_identity(tensor)
        self._elsewhere.add(place)
        weakref.finalize(tensor.untyped_storage(), self._elsewhere.discard, place)
        self.host += tensor.untyped_storage().nbytes()

    def is_left_out(self, tensor: Tensor) -> bool:
        """Whether a tensor, or what it is a part of, does not count."""
        return storage_identity(tensor) in self._elsewhere

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                storage = local_part(tensor).untyped_storage()
                place = storage_identity(local_part(tensor))
                if place not in self._alive and place not in self._known:
                    self._alive[place] = weakref.ref(storage), (self.phase, str(func), str(tensor.dtype))
                    weakref.finalize(storage, self._alive.pop, place, None)
        self._look()
        return result

    def _look(self) -> None:
        """FSDP2 gives storages up, and takes them again, by their size: all are asked each time."""
        phase = self.phases.setdefault(self.phase, Phase())
        # A copy: other threads let go of tensors meanwhile.
        alive = [(ref(), made) for place, (ref, made) in self._alive.copy().items() if place not in self._elsewhere]
        now = sum(storage.nbytes() for storage, _ in alive if storage is not None)
        if now <= phase.peak:
            return
        phase.peak, phase.made = now, {}
        for storage, made in alive if self.inventory else ():
            if storage is not None:
                phase.made[made] = phase.made.get(made, 0) + storage.nbytes()
