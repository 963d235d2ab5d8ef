"""Attention's output kept of layers in chunks: same gradients, attended once, in host memory of exact size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import hf_usp
from hf_usp.memory import host_arena
from hf_usp.memory.activation_offload import offload_checkpoints
from hf_usp.memory.tiled_layer import tile_layers
from hf_usp.tools.live_bytes import LiveBytes

from ..harness import checkpointing, step
from ..ranks import Ranks
from ..tiny import batch_of, largest_difference, tiny_model
from .stand_in import StandIn

LAYERS = 3


def local(batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    return hf_usp.shard(batch, hf_usp.UspMesh.build(ring_degree=1, ulysses_degree=1))


def bytes_on_host(tokens: int, kept: int, layers: int = LAYERS, width: int = 32, heads: int = 4) -> int:
    """Inputs of fp32, attention's outputs as wide, log-sum-exps."""
    return tokens * 4 * (layers * width + kept * (width + heads))


class TestOneProcess:
    @pytest.mark.parametrize("where", ["device", "host", "file"])
    @pytest.mark.parametrize(("kept", "groups"), [(True, 2), (1, 4), (False, 1)])
    def test_gradients_and_bytes(self, where: str, kept: bool | int, groups: int, tmp_path: Path) -> None:
        """In 32 tokens a row, so that no range has to be rounded up."""
        model = tiny_model(num_hidden_layers=LAYERS).train()
        batch = local(batch_of("packed", length=32))
        loss, gradients, _ = step(model, **batch)
        tile_layers(model, 7, groups, kept)
        offloader = StandIn(str(tmp_path) if where == "file" else None)
        if where != "device":
            offload_checkpoints(model, offloader)
        for _ in range(2):
            again, mine, _ = step(model, **batch)
            assert again == pytest.approx(loss, rel=1e-6)
            assert largest_difference(mine, gradients) < 1e-6
            expected = bytes_on_host(2 * 32, LAYERS if kept is True else int(kept)) if where != "device" else 0
            assert (offloader.arena.size, offloader.arena.used) == (expected, 0)
        with torch.no_grad():
            model(**batch, use_cache=False)
        assert offloader.arena.used == 0 and offloader.started == {}

    def test_two_forwards_before_one_backward_and_a_backward_that_never_comes(self) -> None:
        model, batch = tiny_model(num_hidden_layers=LAYERS).train(), local(batch_of("plain", length=32))
        other = local(batch_of("left", length=32))

        def both() -> dict[str, torch.Tensor]:
            model.zero_grad()
            (model(**batch, use_cache=False).loss - 2 * model(**other, use_cache=False).loss).backward()
            return {name: p.grad.clone() for name, p in model.named_parameters()}

        expected = both()
        tile_layers(model, 7, 2, 2)
        offloader = StandIn()
        offload_checkpoints(model, offloader)
        whole = bytes_on_host(2 * 32, 2)
        left = model(**batch, use_cache=False)
        assert (offloader.arena.size, offloader.arena.used) == (whole, whole)
        del left
        assert offloader.arena.used == 0
        assert largest_difference(both(), expected) < 1e-6
        assert (offloader.arena.size, offloader.arena.used) == (2 * whole, 0)
        failing = model.model.layers[2].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**batch, use_cache=False)
        failing.remove()
        assert largest_difference(both(), expected) < 1e-6
        assert (offloader.arena.size, offloader.arena.used) == (2 * whole, 0)

    def test_beside_checkpointed_layers(self) -> None:
        """One that cannot compute in chunks is checkpointed, and its input is fetched as a whole."""
        model, batch = tiny_model(num_hidden_layers=LAYERS).train(), local(batch_of("plain", length=32))
        stock = model.model.layers[1].mlp.up_proj
        stock.forward = lambda x: torch.nn.functional.linear(x + x.roll(1, dims=1), stock.weight)  # type: ignore
        gradients = step(model, **batch)[1]
        checkpointing(model, {"use_reentrant": False})
        tile_layers(model, 7, 2, 1)
        offloader = StandIn()
        offload_checkpoints(model, offloader)
        assert largest_difference(step(model, **batch)[1], gradients) < 1e-6
        assert offloader.arena.used == 0 and offloader.alive == 0
        assert offloader.shapes[0] == offloader.shapes[1] == (2, 32, 32)

    def test_what_is_needed_next_is_on_its_way(self) -> None:
        """A copy begins once what read its buffer before is waited for, while the one before it is worked on."""
        offloader = StandIn()
        pieces = [offloader.buffer(torch.empty(2)).fill_(i) for i in range(3)]
        offloader.fake.log.clear()
        seen = []
        for [piece] in offloader.parts([[x] for x in pieces], torch.device("cpu")):
            seen.append(piece.tolist())
            offloader.fake.log.append(f"work on {int(piece[0])}")
        assert seen == [[i, i] for i in (0.0, 1.0, 2.0)]
        copy = ["ours waits for current", "on ours", "off"]
        assert offloader.fake.log == [
            "current waits for ours",
            *copy,
            "current waits for ours",
            *copy,
            "work on 0",
            "current waits for ours",
            *copy,
            "work on 1",
            "current waits for ours",
            "work on 2",
        ]

    def test_the_device_holds_no_more_for_more_layers(self) -> None:
        """Kept for all layers: as many bytes of the device with 2 layers as with 4, and fewer than with none kept."""
        peaks = {}
        batch = local(batch_of("plain", length=512))
        for layers, kept in ((2, False), (2, True), (4, True)):
            model = tiny_model(num_hidden_layers=layers).train()
            tile_layers(model, 16, 4, kept)
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            live = LiveBytes([x for p in model.parameters() for x in (p, p.grad) if x is not None], inventory=False)
            offload_checkpoints(model, StandIn(live=live))
            with live:
                model(**batch, use_cache=False).loss.backward()
            peaks[layers, kept] = live.peak
        assert peaks[4, True] == pytest.approx(peaks[2, True], rel=0.01)
        assert peaks[2, True] <= peaks[2, False]


def on_a_mesh(ring: int, ulysses: int, kept: bool | int) -> dict[str, Any]:
    """Gradients averaged over ranks, and what forward and backward of the second step launched and sent."""
    from counting import Watch

    mesh = hf_usp.UspMesh.build(ring_degree=ring, ulysses_degree=ulysses)
    model = tiny_model(num_hidden_layers=LAYERS).train()
    hf_usp.apply_context_parallel(model, mesh, layer_chunk_size=5, head_groups=2, keep_attention=kept, self_check=False)
    offloader, batch = StandIn(), batch_of("right", length=64)
    offload_checkpoints(model, offloader)
    model(**batch, use_cache=False).loss.backward()
    model.zero_grad()
    forward, backward = Watch(), Watch()
    with forward:
        loss = model(**batch, use_cache=False).loss
    with backward:
        loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    for gradient in gradients.values():
        dist.all_reduce(gradient)
        gradient /= dist.get_world_size()
    sent = [{name: watch.calls[name] for name in ("send", "all_to_all_single")} for watch in (forward, backward)]
    return {
        "gradients": gradients,
        "area": (forward.area, backward.area),
        "sent": sent,
        "host": (offloader.arena.size, offloader.arena.used),
    }


@pytest.mark.parametrize(("ring", "ulysses"), [(4, 1), (2, 2)])
def test_it_neither_attends_nor_exchanges_again(four_ranks: Ranks, ring: int, ulysses: int) -> None:
    """Of two of three layers, then of all: the backward launches and sends less by exactly those layers' forward."""
    reference = tiny_model(attention="eager", num_hidden_layers=LAYERS).train()
    gradients = {name: x / 3 for name, x in step(reference, **batch_of("right", length=64))[1].items()}
    none, some, every = (four_ranks.run(on_a_mesh, ring, ulysses, kept) for kept in (False, 2, True))
    for rank in range(4):
        for found, kept in ((none, 0), (some, 2), (every, 3)):
            mine = found[rank]
            assert largest_difference(mine["gradients"], gradients) < 5e-6
            (forward, backward), (sent, returned) = mine["area"], mine["sent"]
            assert forward == none[rank]["area"][0] > 0 and sent == none[rank]["sent"][0] and sum(sent.values()) > 0
            assert backward == none[rank]["area"][1] - forward * kept // LAYERS
            assert returned == {name: n - sent[name] * kept // LAYERS for name, n in none[rank]["sent"][1].items()}
            assert mine["host"] == (bytes_on_host(2 * 64 // 4, kept), 0)


def refused(short_rank: int, folder: str) -> list[str]:
    """The words of each rank where one has no host memory left, without offloading and with a file."""
    model = tiny_model().train()
    mesh = hf_usp.UspMesh.build(ring_degree=2, ulysses_degree=1)
    available, said = host_arena.available_memory, []
    if dist.get_rank() == short_rank:
        host_arena.available_memory = lambda: 1000
    for offloader in (StandIn(), None, StandIn(folder)):
        hf_usp.remove_context_parallel(model)
        hf_usp.apply_context_parallel(model, mesh, layer_chunk_size=5, keep_attention=True, self_check=False)
        if offloader is not None:
            offload_checkpoints(model, offloader)
        try:
            model(**batch_of("plain"), use_cache=False).loss.backward()
            said.append("")
        except hf_usp.UspConfigError as refusal:
            said.append(str(refusal))
    host_arena.available_memory = available
    return said


def test_a_rank_without_the_memory_stops_all(two_ranks: Ranks, tmp_path: Path) -> None:
    (first, *others), (second, *more) = two_ranks.run(refused, 1, str(tmp_path))
    assert "no room in host memory on rank(s) 1 of the mesh" in first
    assert "GB of host memory for each of" in second
    assert others == more == ["", ""], "without offloading, and with a file"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"keep_attention": True}, "keep_attention=True without layer_chunk_size"),
        ({"keep_attention": 2}, "keep_attention=2 without layer_chunk_size"),
        ({"keep_attention": -1, "layer_chunk_size": 8}, "keep_attention=-1"),
        ({"keep_attention": "all", "layer_chunk_size": 8}, "keep_attention='all'"),
        ({"offload_checkpoints": "/dev/null/here"}, "offload_checkpoints '/dev/null/here'"),
        ({"offload_checkpoints": 1}, "offload_checkpoints=1"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(hf_usp.UspConfigError, match=named):
        hf_usp.UspParallelismConfig(cp_size=2, **options)


def test_more_layers_than_there_are() -> None:
    with pytest.raises(hf_usp.UspModelError, match="keep_attention=3 with LlamaForCausalLM, which has 2 such layers"):
        tile_layers(tiny_model(), 8, 1, 3)
    assert len(tile_layers(tiny_model(), 8, 1, True)) == 2
