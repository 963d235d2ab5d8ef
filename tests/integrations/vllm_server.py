"""A stand-in for a vLLM server and for the parts of vLLM that TRL's client imports, on loopback and without a GPU.

The server speaks the routes that the client of TRL 1.16 asks. A completion depends on its prompt, its number among
those of the prompt, and the number of the request. Weights come past HTTP, as over NCCL.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
import torch

MODULES = (
    "trl.generation.vllm_client",
    "trl.generation.vllm_generation",
    "trl.trainer.distillation_trainer",
    "trl.experimental.online_dpo.online_dpo_trainer",
)
INFO = {"model_config": {"logprobs_mode": "processed_logprobs"}, "weight_transfer_config": {"backend": "nccl"}}
ANSWERS = {
    "/health": {},
    "/server_info": {"vllm_config": INFO},
    "/get_world_size": {"world_size": 1},
    "/v1/models": {"data": [{"id": "tiny"}]},
}


class VLLMServer(ThreadingHTTPServer):
    """It keeps the prompts it was asked for, the latest weights, and the names of announced and of sent ones."""

    daemon_threads = True

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.tokenizer = tokenizer
        self.prompts: list[list[int]] = []
        self.requests = 0
        self.announced: list[str] = []
        self.sent: list[str] = []
        self.weights: dict[str, torch.Tensor] = {}
        self.updates = 0

    def answer(self, path: str, asked: dict[str, Any]) -> dict[str, Any]:
        if path == "/v1/completions":
            return {"choices": self.complete(asked["prompt"], asked["n"], asked["max_tokens"])}
        if path == "/update_weights":
            self.announced += asked["update_info"]["names"]
        elif path == "/finish_weight_update":
            self.updates += 1
        return ANSWERS.get(path, {})

    def complete(self, prompts: list[Any], n: int, longest: int) -> list[dict[str, Any]]:
        rows = [self.tokenizer(each)["input_ids"] if isinstance(each, str) else each for each in prompts]
        self.prompts += rows
        self.requests += 1
        made = []
        for row, i in ((row, i) for row in rows for i in range(n)):
            generator = torch.Generator().manual_seed(sum(row) * 100 + 10 * self.requests + i)
            ids = [*torch.randint(4, 62, (longest - 1 - (sum(row) + i) % 3,), generator=generator).tolist(), 2]
            names, values = [f"token_id:{x}" for x in ids], [-4.1 - x / 1000 for x in ids]  # near a fresh model's
            top = [{name: value} for name, value in zip(names, values, strict=True)]
            logprobs = {"tokens": names, "token_logprobs": values, "top_logprobs": top}
            made.append({"prompt_token_ids": row, "token_ids": ids, "logprobs": logprobs})
        return made


class Handler(BaseHTTPRequestHandler):
    server: VLLMServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        said = json.dumps(self.server.answer(self.path.partition("?")[0], json.loads(body or "{}"))).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    do_GET = do_POST  # noqa: N815 - the base class asks for the name

    def log_message(self, *_: Any) -> None:
        pass


class TorchWithDevice:
    """torch for the module of OnlineDPO, which asks what device its client sends weights from."""

    accelerator = SimpleNamespace(current_accelerator=lambda: torch.device("cpu"))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextmanager
def served(tokenizer: Any, main: bool) -> Iterator[VLLMServer | None]:
    """A server in the main process, and in all of them what TRL needs of vLLM to ask it."""
    import trl.generation.vllm_client as client

    server = VLLMServer(tokenizer) if main else None

    def send(iterator: Any, trainer_args: Any) -> None:
        assert server is not None and trainer_args.group == "communicator"
        weights = {name: weight.detach().clone() for name, weight in iterator}
        server.weights |= weights
        server.sent += weights

    def init_communicator(self: Any, device: Any = 0) -> None:
        """NCCL refuses CPU; the rest of the client's own method."""
        assert self.get_world_size() == 1 and self.get_server_info()["weight_transfer_config"]
        self._post(f"{self.base_url}/init_weight_transfer_engine", json={"init_info": {}})
        self.communicator = "communicator"

    with pytest.MonkeyPatch.context() as patch:
        for module in MODULES:
            patch.setattr(importlib.import_module(module), "is_vllm_available", lambda **_: True)
        patch.setattr(client.VLLMClient, "init_communicator", init_communicator)
        engine = SimpleNamespace(trainer_send_weights=send)
        online = importlib.import_module(MODULES[-1])
        patch.setattr(online, "SamplingParams", SimpleNamespace, raising=False)
        patch.setattr(online, "torch", TorchWithDevice())
        patch.setattr(client, "NCCLWeightTransferEngine", engine, raising=False)
        patch.setattr(client, "NCCLTrainerSendWeightsArgs", SimpleNamespace, raising=False)
        if server is None:
            yield None
            return
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
