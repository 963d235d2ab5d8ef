"""`generate` of a prepared model, prompts sharded or by rows: the tokens of one process, on every rank."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache
from transformers.generation import GenerationConfig, StoppingCriteria

import hf_usp
from hf_usp.memory.activation_offload import CHECKPOINTING
from hf_usp.models.generation.cache import UspCache
from hf_usp.models.generation.entry import cache_name
from hf_usp.models.generation.settings import refuse_cache_layers
from hf_usp.models.hooks import get_hooks

from ..harness import checkpointing, fresh_accelerate
from ..ranks import Ranks
from ..tiny import HYBRID, SIZES, tiny_model
from .census import tiny_model as census_model

pytestmark = pytest.mark.filterwarnings("ignore:.(is_)?gradient_checkpointing")

EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8, "head_dim": 16}
LATENT = {
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    **{"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12},
    **{"moe_intermediate_size": 16, "num_key_value_heads": 4},
}
IMAGES = {
    "text_config": {**SIZES, "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16},
    "vision_config": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2},
}
# Family, changes of its config, padding of each row, length, settings of generate; "then": tokens of a second turn.
CASES: dict[str, tuple[str, dict[str, Any], tuple[int, ...], int, dict[str, Any]]] = {
    "greedy, left padding": ("llama", {}, (0, 9, 23), 37, {}),
    "a prompt shorter than the mesh": ("qwen3", {}, (0,), 3, {}),
    "sliding window and full": ("qwen2", {}, (0, 7), 45, {}),
    "all layers with a sliding window": ("mistral", {}, (0,), 50, {}),
    "softcap": ("gemma2", {"sliding_window": 8, "head_dim": 16}, (3, 0), 33, {}),
    "sinks, experts": ("gpt_oss", EXPERTS, (0,), 40, {}),
    "latent attention": ("deepseek_v3", LATENT, (0, 5), 30, {}),
    "states of recurrent layers": ("qwen3_5_text", HYBRID, (0, 9), 41, {"num_beams": 2}),
    "states, two turns": ("qwen3_5_text", HYBRID, (0,), 3, {"then": 7}),
    "a model with images, asked in words": ("gemma3", IMAGES, (0, 5), 30, {}),
    "sampling, two sequences each": ("llama", {}, (4, 0), 30, {"do_sample": True, "num_return_sequences": 2}),
    "beams": ("llama", {}, (0, 4), 30, {"num_beams": 3}),
    "prompt lookup": ("qwen2", {}, (0,), 44, {"prompt_lookup_num_tokens": 4}),
    "prefill in chunks": ("qwen2", {}, (0, 0), 41, {"prefill_chunk_size": 16}),
    "two turns": ("qwen2", {}, (0,), 30, {"then": 7}),
    "embeddings": ("llama", {}, (3, 0), 30, {"embeddings": True}),
    "bf16": ("llama", {"dtype": torch.bfloat16}, (0,), 41, {}),
}
NEW = 12
VOCABULARY = 80  # no other width of the counted model


def prompts(pads: tuple[int, ...], length: int) -> dict[str, Tensor]:
    """Prompts with left padding; they repeat themselves."""
    ids = torch.randint(3, 64, (len(pads), length), generator=torch.Generator().manual_seed(5))
    ids[:, length // 2 :] = ids[:, : length - length // 2].clone()
    mask = torch.ones_like(ids)
    for row, padding in enumerate(pads):
        ids[row, :padding] = mask[row, :padding] = 0
    return {"input_ids": ids, "attention_mask": mask}


def prepared(family: str, changes: dict[str, Any], degrees: tuple[int, int], generate: str, **options: Any) -> Any:
    model = tiny_model(family, initializer_range=0.2, **changes).eval()
    mesh = hf_usp.UspMesh.build(ring_degree=degrees[0], ulysses_degree=degrees[1])
    return hf_usp.apply_context_parallel(model, mesh, generate=generate, **options)


def generated(case: str, degrees: tuple[int, int] | None, generate: str = "sharded") -> dict[str, Any]:
    """Tokens, logits and random numbers of a case; of one process without degrees."""
    family, changes, pads, length, settings = CASES[case]
    stock = "eager" if family in ("gemma2", "gpt_oss") else "sdpa"
    if degrees is None:
        model = tiny_model(family, stock, initializer_range=0.2, **changes).eval()
    else:
        model = prepared(family, changes, degrees, generate)
    torch.manual_seed(11 + (dist.get_rank() if degrees else 0))  # ranks draw the numbers of the first one
    given = prompts(pads, length)
    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None} | settings
    then, first = settings.pop("then", 0), given["input_ids"]
    if settings.pop("embeddings", False):
        given["inputs_embeds"] = model.get_input_embeddings()(given.pop("input_ids")).detach()
    if generate != "rows":
        settings |= {"return_dict_in_generate": True, "output_logits": settings.get("num_beams", 1) == 1}
    out = model.generate(**given, **settings)
    found = {"random": torch.rand(3)}
    if generate == "rows" and degrees is not None:
        return found | {"ids": out}
    if then:
        ids = torch.cat([out.sequences, first[:, :then]], dim=1)
        cache = {cache_name(): out[cache_name()]}
        found["then"] = model.generate(ids, attention_mask=torch.ones_like(ids), **cache, **settings).sequences
    return found | {"ids": out.sequences, "logits": torch.stack(out.logits) if out.logits else torch.zeros(1)}


@pytest.mark.parametrize("case", CASES)
def test_sharded_prompts_give_the_tokens_of_one_process(four_ranks: Ranks, case: str) -> None:
    theirs = generated(case, None)
    everyone = four_ranks.run(generated, case, (2, 2))
    for mine in everyone:
        assert torch.equal(mine["logits"], everyone[0]["logits"]), "ranks differ"
        if case == "bf16":
            torch.testing.assert_close(mine["logits"][0], theirs["logits"][0], atol=0.1, rtol=0.1)
            continue  # later tokens may be others
        for name in theirs.keys() - {"logits"}:
            assert torch.equal(mine[name], theirs[name]), name
        torch.testing.assert_close(mine["logits"], theirs["logits"], atol=2e-5, rtol=1e-4)


def of_architecture(subject: str, degrees: tuple[int, int] | None) -> Tensor:
    """Tokens of a tiny model of an architecture, with the layer kinds that it has."""
    model = census_model(subject, "usp" if degrees else "eager").eval()
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, "use_cache": True}
    if degrees:
        mesh = hf_usp.UspMesh.build(ring_degree=degrees[0], ulysses_degree=degrees[1])
        hf_usp.apply_context_parallel(model, mesh, generate="sharded")
    return model.generate(**prompts((4, 0), 21), **settings)


@pytest.mark.parametrize("subject", ["jamba", "falcon_h1", "lfm2", "nemotron_h", "gemma4_text", "llama4_text"])
def test_layers_with_and_without_states(two_ranks: Ranks, subject: str) -> None:
    """Mamba; Mamba-2 beside attention; short convolutions; layers without either; two head widths; chunks."""
    theirs = of_architecture(subject, None)
    assert all(torch.equal(mine, theirs) for mine in two_ranks.run(of_architecture, subject, (2, 1)))


@pytest.mark.parametrize("degrees", [(2, 1), (1, 2)], ids=str)
def test_two_ranks(two_ranks: Ranks, degrees: tuple[int, int]) -> None:
    case = "sliding window and full"
    theirs = generated(case, None)
    assert all(torch.equal(mine["ids"], theirs["ids"]) for mine in two_ranks.run(generated, case, degrees))


def sizes(prompt: int, new: int = 8) -> list[dict[str, Any]]:
    """Messages, schedules, bytes and logits of a prefill and `new` steps on this rank, and Python calls of a step."""
    import hf_usp.batch.layout as layouts
    import hf_usp.distributed.comm as comm

    counts: dict[str, Any] = {"gathered": [], "others": 0, "plans": 0, "tokens of logits": 0, "calls": []}
    stock = {
        (comm, "all_gather_into"): comm.all_gather_into,
        (layouts, "make_ring_schedule"): layouts.make_ring_schedule,
    }
    names = ("all_to_all_single", "batch_isend_irecv", "all_reduce", "all_gather_object", "broadcast_object_list")
    stock |= {(dist, name): getattr(dist, name) for name in names}

    def counting(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if name == "all_gather_into":
                counts["gathered"].append(args[1].numel() * args[1].element_size())
            elif name == "make_ring_schedule":
                counts["plans"] += 1
            else:
                counts["others"] += 1
            return function(*args, **kwargs)

        return call

    class LargestLogits(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.ndim == 3 and out.shape[-1] == VOCABULARY:
                counts["tokens of logits"] = max(counts["tokens of logits"], out.shape[1])
            return out

    model = prepared(
        "llama", {"vocab_size": VOCABULARY, "max_position_embeddings": 8192}, (2, 2), "sharded", self_check=False
    )
    ids = torch.randint(3, 64, (1, prompt), generator=torch.Generator().manual_seed(0))
    found: list[dict[str, Any]] = []

    class Snapshot(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
            sys.setprofile(None)
            held = [layer.keys.untyped_storage().nbytes() for layer in cache.layers]
            found.append({**counts, "gathered": list(counts["gathered"]), "bytes": held})
            counts.update({"gathered": [], "others": 0, "plans": 0, "calls": 0})
            sys.setprofile(lambda frame, event, arg: counts.update(calls=counts["calls"] + (event == "call")))
            return torch.zeros(len(input_ids), dtype=torch.bool)

    hooks = get_hooks(model)
    assert hooks is not None
    with torch.no_grad():
        model(ids[:, :16])  # the traits of the model are measured
    cache = UspCache(model, hooks.mesh)
    for (module, name), function in stock.items():
        setattr(module, name, counting(name, function))
    try:
        with LargestLogits():
            model.generate(
                ids, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0,
                stopping_criteria=[Snapshot()], **{cache_name(): cache},
            )  # fmt: skip
    finally:
        sys.setprofile(None)
        for (module, name), function in stock.items():
            setattr(module, name, function)
    return found


def test_counts_of_prefill_and_steps(four_ranks: Ranks) -> None:
    heads, width, layers = 4, 8, 2
    short, long = four_ranks.run(sizes, 512), four_ranks.run(sizes, 2048)
    for prompt, everyone in ((512, short), (2048, long)):
        for prefill, *steps in everyone:
            assert prefill["plans"] == 1
            assert prefill["tokens of logits"] <= 4, "logits of more than one token a rank"
            most = prompt // 4 * 2 * width * 4  # two kv heads in fp32
            assert all(most <= held <= 1.01 * most for held in prefill["bytes"])
            for step in steps:
                assert step["plans"] == step["others"] == 0
                # One message a layer, of an output and a log-sum-exp a head; one of three numbers compares the tokens.
                assert step["gathered"] == [3 * 8] + [heads * (width + 1) * 4] * layers
    assert 0 < short[0][-1]["calls"] == long[0][-1]["calls"], "Python's work grows with the prompt"


def refusals() -> dict[str, tuple[str, str]]:
    """Bad input to `generate` on two ranks: the class and text of each refusal on this rank."""
    rank = dist.get_rank()
    model = prepared("llama", {}, (2, 1), "sharded")
    given = prompts((0, 3), 20)
    alone = hf_usp.UspMesh.build(ring_degree=1, ulysses_degree=1)
    name, ids, ones = cache_name(), given["input_ids"], torch.ones_like(given["input_ids"])
    hooks = get_hooks(model)
    assert hooks is not None

    def run(of: Any = model, **changes: Any) -> Any:
        return of.generate(**given | {"max_new_tokens": 4, "pad_token_id": 0, "do_sample": False} | changes)

    def noise(input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.scatter(1, torch.full((len(scores), 1), 5 + rank), 1e4)

    def checkpointed() -> Any:
        checkpointing(model.train(), None)
        try:
            return run()
        finally:
            getattr(model.eval(), f"{CHECKPOINTING}_disable")()

    def configured(**changes: Any) -> Any:
        other = prepared("llama", {}, (2, 1), "sharded")
        for key, value in changes.items():
            setattr(other.config, key, value)
        return other

    def turn() -> UspCache:
        """The cache of the first half of the padded prompts."""
        cache = UspCache(model, hooks.mesh)
        model(ids[:, :10], attention_mask=given["attention_mask"][:, :10], **{name: cache})
        return cache

    cases: dict[str, Callable[[], Any]] = {
        "prompts that differ": lambda: run(input_ids=ids + rank),
        "settings that differ": lambda: run(generation_config=GenerationConfig(max_new_tokens=4 + rank)),
        "one empty prompt": lambda: run(input_ids=ids[:, : 20 * (1 - rank)], attention_mask=None),
        "an empty prompt": lambda: run(input_ids=ids[:, :0], attention_mask=None),
        "padding on the right": lambda: run(attention_mask=given["attention_mask"].flip(1)),
        "another mesh": lambda: run(**{name: UspCache(model, alone)}),
        "another mesh, by hand": lambda: model(ids, **{name: UspCache(model, alone)}),
        "another cache": lambda: run(**{name: DynamicCache()}),
        "other padding": lambda: run(attention_mask=ones, **{name: turn()}),
        "use_cache": lambda: run(use_cache=False),
        "use_cache beside a cache": lambda: model(ids, use_cache=False, **{name: UspCache(model, hooks.mesh)}),
        "not prepared": lambda: tiny_model("llama")(ids, **{name: UspCache(model, hooks.mesh)}),
        "beams": lambda: run(num_beams=100),
        "clock": lambda: run(max_time=1.0),
        "static": lambda: run(cache_implementation="static"),
        "quantized": lambda: run(cache_implementation="quantized"),
        "assistant": lambda: run(assistant_model=tiny_model("llama")),
        "indices": lambda: run(configured(layer_types=["indexed_attention", "full_attention"])),
        "states": lambda: run(configured(layer_types=["linear_attention", "full_attention"])),
        "shared keys": lambda: run(configured(num_kv_shared_layers=1)),
        "checkpointing": checkpointed,
        "other tokens": lambda: run(logits_processor=[noise]),
        "rows, scores": lambda: run(prepared("llama", {}, (2, 1), "rows"), return_dict_in_generate=True),
        "layers that remember": lambda: run(remembering()),
    }
    found = {}
    for case, call in cases.items():
        with torch.no_grad(), pytest.raises(hf_usp.UspError) as problem:
            call()
        found[case] = (type(problem.value).__name__, str(problem.value))
    # The ranks are still together, and a criterion of which only the first rank's answer counts stops both.
    stopping = [lambda tokens, scores: torch.full((len(tokens),), rank == 0 and tokens.shape[1] >= 22)]
    found["together"] = (str(tuple(run(stopping_criteria=stopping).shape)), "")
    with torch.no_grad():
        cache = UspCache(model, hooks.mesh)
        stepwise = [
            model(x, attention_mask=ones[:, :n], **{name: cache}).logits for x, n in ((ids[:, :9], 9), (ids[:, 9:], 20))
        ]
        whole = tiny_model("llama", "sdpa", initializer_range=0.2).eval()(ids).logits
    found["by hand"] = (str(bool((torch.cat(stepwise, dim=1) - whole).abs().max() < 1e-4)), "")
    hf_usp.remove_context_parallel(model)
    found["removed"] = (str("generate" in vars(model)), "")
    return found


def remembering() -> Any:
    """A model with a layer that adds, to a single token, what it remembers of the last one: a cache of its own."""
    model = prepared("llama", {}, (2, 1), "sharded")
    memory: list[Tensor] = []

    def remember(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        added = output + memory[-1] if output.shape[1] == 1 and memory else output
        memory.append(output[:, -1:])
        return added

    model.model.layers[0].mlp.register_forward_hook(remember)
    return model


def test_bad_input_is_refused_on_every_rank(two_ranks: Ranks) -> None:
    everyone = two_ranks.run(refusals)
    texts = {
        "prompts that differ": "differs from that of rank 0",
        "settings that differ": "differs from that of rank 0",
        "one empty prompt": "an empty prompt",
        "an empty prompt": "an empty prompt",
        "padding on the right": "padding after a token",
        "another mesh": "made for a mesh of the ranks",
        "another mesh, by hand": "made for a mesh of the ranks",
        "another cache": "a DynamicCache",
        "other padding": "other padding (attention_mask)",
        "use_cache": "use_cache=False in generate",
        "use_cache beside a cache": "use_cache=False beside a cache",
        "not prepared": "without context parallelism",
        "beams": "num_beams=100",
        "clock": "max_time=1.0",
        "static": "cache_implementation='static'",
        "quantized": "cache_implementation='quantized'",
        "assistant": "an assistant_model",
        "indices": "layers of type indexed_attention",
        "states": "whose recurrent layers have states that no other rank gets",
        "shared keys": "num_kv_shared_layers=1",
        "checkpointing": "activation checkpointing",
        "other tokens": "rank 1 chose other tokens",
        "rows, scores": "return_dict_in_generate=True",
        "layers that remember": "does not generate from a sharded prompt",
    }
    for mine in everyone:
        for case, text in texts.items():
            assert text in mine[case][1], (case, mine[case])
        assert [mine[name][0] for name in ("together", "by hand", "removed")] == ["(2, 22)", "True", "False"]


@pytest.mark.parametrize(
    "family",
    ["axk2", "deepseek_v32", "deepseek_v4", "glm_moe_dsa", "minimax", "qwen4_exp_text", "recurrent_gemma", "zaya"],
)
def test_layers_that_keep_more_than_keys_and_states_are_refused(family: str) -> None:
    """Also where a short prompt would not show it: every key is selected as long as there are few."""
    assert refuse_cache_layers(census_model(family, "usp")) is not None
    assert refuse_cache_layers(census_model("deepseek_v3", "usp")) is None


def mended() -> list[Tensor]:
    """The tokens once what was refused is left out."""
    model, hybrid = prepared("llama", {}, (2, 1), "sharded"), prepared("qwen3_5_text", HYBRID, (2, 1), "whole")
    return [tokens for of in (model, hybrid) for tokens in remedied(of)]


def remedied(model: Any) -> list[Tensor]:
    """In evaluation mode under checkpointing; as many beams as tokens; padding on the left, no use_cache."""
    checkpointing(model.train(), None)
    model.eval()
    settings = {**prompts((0, 3), 20), "pad_token_id": 0, "do_sample": False, "max_new_tokens": 2}
    return [model.generate(**settings), model.generate(**settings, num_beams=64)]


def test_remedies_are_followed(two_ranks: Ranks) -> None:
    theirs = [
        tokens
        for family, changes in (("llama", {}), ("qwen3_5_text", HYBRID))
        for tokens in remedied(tiny_model(family, "sdpa", initializer_range=0.2, **changes))
    ]
    for mine in two_ranks.run(mended):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


ROWS = ("greedy, left padding", "sampling, two sequences each", "beams", "embeddings")


@pytest.mark.parametrize("case", ROWS)
def test_rows_give_the_tokens_and_random_numbers_of_one_process(four_ranks: Ranks, case: str) -> None:
    """Three rows or two, for four ranks: some ranks have none."""
    theirs = generated(case, None)
    for mine in four_ranks.run(generated, case, (2, 2), "rows"):
        assert torch.equal(mine["ids"], theirs["ids"])
        assert "sampling" not in case or torch.equal(mine["random"], theirs["random"])


def chosen() -> list[str]:
    """The way of each call under "auto"; ends of rows differ, and padding follows them."""
    from hf_usp.models.generation import entry

    model = prepared("llama", {"max_position_embeddings": 32768}, (2, 1), "auto")
    hooks = get_hooks(model)
    assert hooks is not None
    short, one = prompts((0, 3), 20), prompts((0,), 20)
    settings = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": list(range(3, 24)), "pad_token_id": 0}
    ends = model.generate(**short, **settings)
    before = entry.LONG_PROMPT, entry.free_memory
    entry.LONG_PROMPT = 40
    try:
        long = prompts((0, 3), 40)
        found = [hooks.generation._agree(x) for x in (short, long, one, long | {"max_time": 1.0})]
        entry.free_memory = lambda _: 1 << (30 if dist.get_rank() else 10)  # on one rank the cache does not fit
        found += [hooks.generation._agree(x) for x in (short, one)]
    finally:
        entry.LONG_PROMPT, entry.free_memory = before
    whole = tiny_model("llama", "sdpa", initializer_range=0.2, max_position_embeddings=32768).eval()
    return [*found, str(torch.equal(ends, whole.generate(**short, **settings)))]


def test_auto_takes_rows_or_shards(two_ranks: Ranks) -> None:
    assert two_ranks.run(chosen) == [["rows", "sharded", "whole", "rows", "sharded", "sharded", "True"]] * 2


def accelerated() -> Tensor:
    """`generate` of the model in DDP, as an accelerator prepares it, within `no_sync` and in training mode."""
    from accelerate import Accelerator

    fresh_accelerate()
    config = hf_usp.UspParallelismConfig(cp_size=2, generate="sharded")
    accelerator = Accelerator(cpu=True, parallelism_config=config)
    model = accelerator.prepare(tiny_model("llama", initializer_range=0.2).train())
    with accelerator.no_sync(model):
        return accelerator.unwrap_model(model).generate(**prompts((0, 3), 20), max_new_tokens=6, do_sample=False)


def test_an_accelerator_passes_the_option_on(two_ranks: Ranks) -> None:
    model = tiny_model("llama", "sdpa", initializer_range=0.2)
    theirs = model.generate(**prompts((0, 3), 20), max_new_tokens=6, do_sample=False)
    assert all(torch.equal(mine, theirs) for mine in two_ranks.run(accelerated))
