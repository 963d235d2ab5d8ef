"""The law of hf_usp/compat.py: no other file names something private of another library, or looks at a version."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import hf_usp

ROOT = Path(hf_usp.__file__).parent
SOURCES = sorted(ROOT.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}
COMPAT = TREES[ROOT / "compat.py"]
OTHERS = [path for path in SOURCES if path != ROOT / "compat.py"]
every_other_source = pytest.mark.parametrize("path", OTHERS, ids=lambda p: p.relative_to(ROOT).as_posix())

# Names with an underscore that other files may use. Those of Python's data model (`__x__`) are free, except PEEKING.
PRIVATE_ALLOWED = {
    "_parameters": "torch documents how a module keeps its parameters; the self-check puts replaced ones back",
    "_buffers": "as `_parameters`: a buffer that a forward replaced is put back under its name",
    "_exit": "os._exit is public and documented: a process that hangs cannot end otherwise",
    "_current_frames": "sys._current_frames is documented: the watchdog shows where a rank hangs",
}
PEEKING = {"_getframe", "__qualname__", "__version__"}
OURS = {"self", "cls", "super"}
ASKING = {"hasattr", "getattr", "setattr", "delattr"}
ROOTS = {"hf_usp", *sys.stdlib_module_names}


def private_names(tree: ast.Module, ours: set[str]) -> Iterator[str]:
    """Each use of a private or version-dependent name of another library, as `line N: CODE`.

    ours: underscore names that hf_usp itself defines; they may be read off objects other than `self`.
    """
    foreign = set(foreign_names(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found = is_private(node.attr) and node.attr not in ours and root(node.value, "(") not in OURS
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found = imports_private(node)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ASKING:
            asks_a_library = root(node.args[0], ".") in foreign and (node.func.id == "hasattr" or len(node.args) == 3)
            name = first_text(node.args[1])
            found = asks_a_library or (is_private(name) and name not in ours)
        else:
            continue
        if found:
            yield f"line {node.lineno}: {ast.unparse(node)}"


def root(node: ast.expr, until: str) -> str:
    return ast.unparse(node).partition(until)[0]


def imports_private(node: ast.Import | ast.ImportFrom) -> bool:
    """Whether an import names something private of another package, or the module that tells versions."""
    names = [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        if node.level or (node.module or "").split(".")[0] == "hf_usp":
            return False
        names = [f"{node.module}.{name}" for name in names]
    return any(name.startswith("importlib.metadata") or any(map(is_private, name.split("."))) for name in names)


def first_text(node: ast.expr) -> str:
    """The name in `getattr(x, "name")`, or the text at the beginning of an f-string."""
    if isinstance(node, ast.JoinedStr) and node.values:
        node = node.values[0]
    return str(node.value) if isinstance(node, ast.Constant) else ""


def is_private(name: str) -> bool:
    dunder = name.startswith("__") and name.endswith("__")
    return name in PEEKING or (name.startswith("_") and not dunder and name not in PRIVATE_ALLOWED and name != "_")


def foreign_names(tree: ast.Module) -> Iterator[str]:
    """Names under which a file has imported packages that are neither ours nor Python's, and what is in them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] not in ROOTS:
                    yield (alias.asname or alias.name).split(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] not in ROOTS:
            yield from (alias.asname or alias.name for alias in node.names)


def defined(tree: ast.Module) -> Iterator[str]:
    """Functions, methods and classes with an underscore that a file defines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name.startswith("_"):
            yield node.name


UPSTREAM = {node.attr for node in ast.walk(COMPAT) if isinstance(node, ast.Attribute)}
OWN_PRIVATE = {name for tree in TREES.values() for name in defined(tree)} - UPSTREAM


@every_other_source
def test_private_names_of_others_are_in_compat_alone(path: Path) -> None:
    found = list(private_names(TREES[path], OWN_PRIVATE))
    assert not found, f"{found}: give it an entry in hf_usp/compat.py"


@every_other_source
def test_private_names_of_compat_are_used_there_alone(path: Path) -> None:
    """Also on `self`: a subclass of Accelerate's has Accelerate's attributes."""
    private = {name for name in UPSTREAM if is_private(name)}
    used = {node.attr for node in ast.walk(TREES[path]) if isinstance(node, ast.Attribute)}
    assert not used & private, f"{used & private}: hf_usp/compat.py has an entry for it"


def test_every_entry_of_compat_is_documented_and_used() -> None:
    entries = [node for node in COMPAT.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
    imports = (node for path in OTHERS for node in ast.walk(TREES[path]) if isinstance(node, ast.ImportFrom))
    used = {alias.name for node in imports if (node.module or "") == "compat" for alias in node.names}
    for entry in entries:
        assert ast.get_docstring(entry), entry.name
        assert entry.name in used, f"nothing uses {entry.name}: delete it"
    assert len(entries) > 20


@pytest.mark.parametrize("name", PRIVATE_ALLOWED)
def test_every_allowed_private_name_is_used(name: str) -> None:
    assert any(isinstance(n, ast.Attribute) and n.attr == name for t in TREES.values() for n in ast.walk(t)), name


@pytest.mark.parametrize(
    "code",
    [
        "group._get_backend(device)",
        "torch.autograd._profiler_enabled()",
        "torch.ops.aten._flash_attention_forward.default",
        "from torch.distributed.distributed_c10d import _world",
        "from torch.utils._pytree import tree_map",
        "import torch.utils._pytree as pytree",
        "from importlib.metadata import version",
        "sys._getframe(1)",
        "function.__qualname__",
        "torch.__version__",
        'getattr(layer, "_gradient_checkpointing_func", None)',
        'getattr(kind, f"_supports_{way}", False)',
        "layer._gradient_checkpointing_func = function",
        'import torch.distributed as dist\nhasattr(dist, "all_gather_single")',
        'from transformers import masking_utils\nhasattr(masking_utils, "remap")',
        'from transformers import trainer_pt_utils\ngetattr(trainer_pt_utils, "BatchRebalanceSampler", ())',
    ],
)
def test_sabotage_of_the_private_names(code: str) -> None:
    assert list(private_names(ast.parse(code), {"_of"}))


@pytest.mark.parametrize(
    "code",
    [
        "self._handles",
        "cls._of(ranks)",
        "super()._shard(model)",
        "module.__dict__",
        "mesh._of(ranks)",
        "from ..compat import _captured",
        'hasattr(parameter, "device_mesh")',
        'import os\nhasattr(os, "sysconf")',
    ],
)
def test_names_that_need_no_entry(code: str) -> None:
    assert not list(private_names(ast.parse(code), {"_of"}))
