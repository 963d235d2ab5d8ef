"""The laws of the house: who may import what, no hidden state, a lean import. Read from the sources' syntax trees."""

from __future__ import annotations

import ast
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

import hf_usp

ROOT = Path(hf_usp.__file__).parent

# Packages, lowest first. Imports point downwards, or sideways without a cycle. A new package takes a place here.
LAYERS = (
    ("errors",),
    ("compat", "utils"),
    ("sharding", "kernels"),
    ("distributed", "planner"),
    ("batch",),
    ("attention",),
    ("recurrent",),
    ("models",),
    ("memory",),
    ("integrations",),
    ("config", "callbacks"),
    ("tools", "__main__"),
    ("__init__",),
)
LAYER = {package: i for i, packages in enumerate(LAYERS) for package in packages}

# Decided in integers and plain numbers, without torch: these import each other and nothing else of ours.
INTEGERS = {
    "errors",
    "sharding",
    "utils.validation",
    "planner.hardware",
    "planner.layer_memory",
    "planner.memory_model",
    "planner.roofline",
    "planner.workload",
}
# Package -> ours that may import it. A package that is not listed here is free everywhere.
ONLY_IN = {
    "torch": set(LAYER) - {"errors", "sharding", "planner"},
    "torch.distributed": {"compat", "distributed", "integrations", "tools"},
    "transformers": {package for package, layer in LAYER.items() if layer >= LAYER["models"]} | {"compat", "planner"},
    "accelerate": {package for package, layer in LAYER.items() if layer >= LAYER["integrations"]} | {"compat"},
    "matplotlib": {"tools", "planner"},
    "flash_attn": {"kernels"},
}
LONGEST_FILE = 400
CONTAINERS = {"dict", "list", "set", "bytearray", "defaultdict", "deque", "Counter", "OrderedDict", "SimpleNamespace"}
HIDDEN = {"local", "ContextVar", "cache", "lru_cache", "WeakKeyDictionary", "WeakValueDictionary", "WeakSet"}
MUTATORS = {
    "add",
    "append",
    "clear",
    "discard",
    "extend",
    "insert",
    "pop",
    "popitem",
    "remove",
    "setdefault",
    "sort",
    "update",
}

SOURCES = sorted(ROOT.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}
every_source = pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())


def package_of(path: Path) -> str:
    """`kernels/eager.py` is in `kernels`, `config.py` in `config`."""
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


def module_of(path: Path) -> str:
    """Dotted name inside the package; the package's own is ''."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").rstrip(".")


MODULES = {module_of(path): path for path in SOURCES}


def imports(path: Path) -> Iterator[tuple[str | None, str]]:
    """Every import of a file, also inside functions: (module of ours, "") or (None, module of others)."""
    package = path.relative_to(ROOT).parent.parts
    checked = {
        inner
        for node in ast.walk(TREES[path])
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(TREES[path]):
        if node in checked:
            continue  # only type checkers read it
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield (alias.name.partition(".")[2], "") if alias.name.split(".")[0] == "hf_usp" else (None, alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level == 0 and base.split(".")[0] != "hf_usp":
                for alias in node.names:
                    yield None, f"{base}.{alias.name}"
                continue
            above = package[: len(package) - node.level + 1] if node.level else ()
            here = ".".join([*above, *([base.removeprefix("hf_usp").lstrip(".")] if base else [])]).strip(".")
            for alias in node.names:
                inner = f"{here}.{alias.name}".strip(".")
                yield (inner if inner in MODULES else here), ""


def is_integers(module: str) -> bool:
    return any(inside(module, name) for name in INTEGERS)


def inside(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


@every_source
def test_every_package_has_its_layer(path: Path) -> None:
    assert package_of(path) in LAYER, f"give {package_of(path)} a place in LAYERS"


@every_source
def test_imports_point_downwards(path: Path) -> None:
    here = package_of(path)
    for target, _ in imports(path):
        if target is None:
            continue
        there = package_of(MODULES[target])
        assert LAYER[there] <= LAYER[here], f"{here} (layer {LAYER[here]}) imports {there} (layer {LAYER[there]})"
        pure = is_integers(module_of(path))
        assert not pure or is_integers(target), f"{module_of(path)} is pure integers and imports {target}"


@pytest.mark.parametrize("of", [lambda name: name, lambda name: package_of(MODULES[name])], ids=["modules", "packages"])
def test_imports_have_no_cycle(of: Callable[[str], str]) -> None:
    edges: dict[str, set[str]] = {}
    for name, path in MODULES.items():
        edges.setdefault(of(name), set()).update({of(t) for t, _ in imports(path) if t is not None} - {of(name)})
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"import cycle: {' -> '.join([*trail, name])}"
        if name not in done:
            for target in sorted(edges[name]):
                visit(target, (*trail, name))
            done.add(name)

    for name in edges:
        visit(name, ())


@every_source
def test_packages_stay_in_their_places(path: Path) -> None:
    for _, foreign in imports(path):
        for package, places in ONLY_IN.items():
            if inside(foreign, package):
                assert package_of(path) in places, (
                    f"{foreign} in {package_of(path)}; {package} belongs in {sorted(places)}"
                )


def assignments(body: list[ast.stmt]) -> Iterator[tuple[str, ast.expr]]:
    """Names bound to values at module or class level, inside `if` and `try` as well."""
    for node in body:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                yield ast.unparse(target), node.value
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            yield ast.unparse(node.target), node.value
        elif isinstance(node, ast.ClassDef | ast.If | ast.Try | ast.With):
            yield from assignments(node.body)


def is_mutable(value: ast.expr) -> bool:
    if isinstance(value, ast.Call):
        return called(value) in CONTAINERS
    return isinstance(value, ast.Dict | ast.List | ast.Set | ast.DictComp | ast.ListComp | ast.SetComp)


def called(node: ast.AST) -> str:
    """The last part of what a call or decorator names: `functools.lru_cache(None)` -> lru_cache."""
    text = ast.unparse(node.func if isinstance(node, ast.Call) else node)
    return text.split("[")[0].split(".")[-1]


def changes(tree: ast.Module) -> Iterator[str]:
    """Names whose containers a file changes: NAME[...] = , NAME += , del NAME[...], NAME.append(...)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript | ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
            yield ast.unparse(node.value).split(".")[-1]
        elif isinstance(node, ast.AugAssign):
            yield ast.unparse(node.target).split(".")[-1]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUTATORS:
            yield ast.unparse(node.func.value).split(".")[-1]


@cache
def changed_anywhere() -> set[str]:
    """Names whose containers any file changes."""
    return {name for tree in TREES.values() for name in changes(tree)}


@every_source
def test_modules_keep_no_mutable_state(path: Path) -> None:
    tree, changed = TREES[path], changed_anywhere()
    for name, value in assignments(tree.body):
        if is_mutable(value) and name != "__all__":
            assert name.isupper(), f"{name} holds a container at module level: name it as a constant, or pass it along"
            assert name not in changed, f"the constant {name} is changed somewhere"
        assert not (isinstance(value, ast.Call) and called(value) in HIDDEN), f"{name} hides state in a module"
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Global), f"line {node.lineno}: `global`"
        if isinstance(node, ast.FunctionDef):
            names = {called(decorator) for decorator in node.decorator_list}
            assert not names & HIDDEN, f"{node.name} remembers its results in the module"


# None beside an installed package.
SCRIPTS = sorted(path for folder in ("scripts", "benchmarks") for path in (ROOT.parent / folder).rglob("*.py"))
ERRORS = {name for name in vars(hf_usp.errors) if name.startswith("Usp")} | {"kind"}


@pytest.mark.parametrize("path", [*SOURCES, *SCRIPTS], ids=lambda p: p.relative_to(ROOT.parent).as_posix())
def test_every_refusal_has_a_rule_and_a_remedy(path: Path) -> None:
    """Required by the constructor too, but most refusals are made where no test goes."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and called(node) in ERRORS:
            said = {keyword.arg: keyword.value for keyword in node.keywords}
            for part in ("rule", "remedy"):
                assert part in said, f"line {node.lineno}: a refusal without {part}"
                text = said[part]
                assert not (isinstance(text, ast.Constant) and not text.value), f"line {node.lineno}: an empty {part}"


@every_source
def test_files_are_short(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST_FILE, f"{lines} lines: split it"


@every_source
def test_every_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(TREES[path])


def is_record(node: ast.ClassDef) -> bool:
    """A dataclass or NamedTuple."""
    return "dataclass" in {called(x) for x in node.decorator_list} or "NamedTuple" in {called(x) for x in node.bases}


@every_source
def test_every_field_has_its_line(path: Path) -> None:
    """Public dataclasses and NamedTuples list each field under `Attributes:`."""
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.ClassDef) and is_record(node) and not node.name.startswith("_"):
            told = (ast.get_docstring(node) or "").partition("Attributes:")[2]
            fields = [ast.unparse(x.target) for x in node.body if isinstance(x, ast.AnnAssign)]
            missing = [name for name in fields if not name.startswith("_") and f"\n    {name}: " not in told]
            assert not missing, f"{node.name}: {missing}"


@pytest.mark.parametrize("name", hf_usp.__all__)
def test_every_public_name_is_documented(name: str) -> None:
    thing = getattr(hf_usp, name)
    assert inspect.getdoc(thing), name
    if inspect.isclass(thing):
        for member, value in vars(thing).items():
            function = getattr(value, "__func__", getattr(value, "fget", value))
            if not member.startswith("_") and inspect.isfunction(function):
                assert inspect.getdoc(getattr(thing, member)), f"{name}.{member}"


# Run in a fresh process. `before` are the imports of others that hf_usp makes, so that what is compared is only what
# hf_usp itself changes in them.
PROBE = """
import json, os, random, sys, warnings
import torch, torch.distributed
exec(sys.argv[1])

def picture():
    seen = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] not in ("transformers", "accelerate"):
            continue
        for attribute, value in list(vars(module).items()):
            seen[f"{name}.{attribute}"] = id(value)
            if isinstance(value, (dict, list, set)) and not attribute.startswith("__"):
                seen[f"{name}.{attribute}[...]"] = repr([id(x) for x in value]) + repr(len(value))
            if isinstance(value, type) and value.__module__ == name:
                for member, inner in list(vars(value).items()):
                    seen[f"{name}.{attribute}.{member}"] = id(inner)
                    if isinstance(inner, dict):
                        for key, entry in inner.items():
                            seen[f"{name}.{attribute}.{member}[{key}]"] = id(entry)
    return seen

def process():
    return [dict(os.environ), list(map(str, warnings.filters)), str(random.getstate()),
            torch.random.get_rng_state().tolist(), torch.get_num_threads(), str(torch.get_default_dtype())]

before, mine = picture(), process()
import hf_usp
after = picture()
print(json.dumps({
    "changed": sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k)),
    "process": process() == mine,
    "cuda": torch.cuda.is_initialized(),
    "group": torch.distributed.is_initialized(),
    "loaded": sorted(sys.modules),
}))
"""


@pytest.fixture(scope="module")
def fresh_import() -> dict:
    """The effects of `import hf_usp` on a fresh process."""
    foreign, loaded, waiting = set(), {""}, [""]
    while waiting:  # what `import hf_usp` loads, of ours
        found = {target for target, _ in imports(MODULES[waiting.pop()]) if target is not None} - loaded
        loaded |= found
        waiting += found
    for name in loaded:
        for node in TREES[MODULES[name]].body:
            theirs = isinstance(node, ast.ImportFrom) and not node.level and node.module is not None
            if theirs and node.module.split(".")[0] in ("transformers", "accelerate"):
                foreign.add(ast.unparse(node))
    # Not the environment of this process, which has imported hf_usp already.
    kept = ("PATH", "HOME", "PYTHONPATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "SYSTEMROOT")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    command = [sys.executable, "-c", PROBE, "\n".join(sorted(foreign))]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.timeout(300)
def test_import_starts_nothing(fresh_import: dict) -> None:
    assert not fresh_import["cuda"], "CUDA was initialised"
    assert not fresh_import["group"], "a process group was started"
    assert fresh_import["process"], "environment, warning filters, random state, threads or default dtype changed"
    loaded = {name.split(".")[0] for name in fresh_import["loaded"]}
    assert not loaded & {"flash_attn", "matplotlib", "deepspeed", "datasets", "trl", "peft"}
    assert (
        "hf_usp.tools.cli" not in fresh_import["loaded"]
        and "hf_usp.tools.explain.numbers" not in fresh_import["loaded"]
    )


@pytest.mark.timeout(300)
def test_import_changes_nothing_of_others_but_the_name_usp(fresh_import: dict) -> None:
    places = {name.rpartition("._global_mapping")[0].rpartition(".")[2] for name in fresh_import["changed"]}
    assert places == {"AttentionInterface", "AttentionMaskInterface"}, fresh_import["changed"]
    assert all(name.endswith("._global_mapping[usp]") for name in fresh_import["changed"]), fresh_import["changed"]
