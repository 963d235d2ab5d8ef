"""The documentation: no broken link, every Python block is Python, and those that need nothing else run."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest

import hf_usp
from hf_usp import errors

from .planner import recipes
from .test_laws import LAYERS

ROOT = Path(__file__).parents[1]
TOP = ("README.md", "README.zh.md", "CONTRIBUTING.md", "CHANGELOG.md")
PAGES = [*(ROOT / name for name in TOP), *sorted((ROOT / "docs").rglob("*.md"))]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
OF_OTHERS = {"script.py", "train.py", "modeling_rope_utils.py", "modeling_utils.py"}  # files named that are not ours
# Blocks that speak of the reader's model, trainer or data: compiled only. All others run.
NEEDS = re.compile(r"from_pretrained|\btrainer\b|\bTrainingArguments\b|\.\.\.")


def blocks(page: Path) -> list[str]:
    """Python blocks, indentation of lists removed."""
    found = re.findall(r"^( *)```python\n(.*?)^ *```", page.read_text(encoding="utf-8"), re.M | re.S)
    return [re.sub(f"^{indent}", "", text, flags=re.M) for indent, text in found]


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://|#|mailto:", target):
            continue
        assert (page.parent / target.split("#")[0]).exists(), target


@every_page
def test_python_blocks_compile_and_run(page: Path) -> None:
    for block in blocks(page):
        code = compile(block, str(page), "exec")
        if not NEEDS.search(block):
            exec(code, {"__name__": "block"})


def test_enough_blocks_run() -> None:
    run = [block for page in PAGES for block in blocks(page) if not NEEDS.search(block)]
    assert len(run) >= 4


def test_every_page_is_in_the_menu() -> None:
    menu = (ROOT / "mkdocs.yml").read_text()
    assert all(page.name in menu for page in (ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("page, most", [("README.md", 100), ("README.zh.md", 100), ("docs/glossary.md", 40)])
def test_pages_that_are_read_first_are_short(page: str, most: int) -> None:
    assert len((ROOT / page).read_text(encoding="utf-8").splitlines()) <= most


def test_both_front_pages_say_the_same() -> None:
    """As many sections, tables, rows and links, the same code and the same figures."""
    english, chinese = ((ROOT / name).read_text(encoding="utf-8") for name in TOP[:2])
    for pattern in (r"^## ", r"^\|", r"^```", r"^\* "):
        assert len(re.findall(pattern, english, re.M)) == len(re.findall(pattern, chinese, re.M)), pattern
    for pattern in (
        r"\d+\.\d+",
        r"\]\((?:docs|results|scripts)/[^)]+\)",
        r"^(?:make|model|config|args|Trainer)\b[^#\n]*",
    ):
        assert set(re.findall(pattern, english, re.M)) <= set(re.findall(pattern, chinese, re.M)), pattern


def test_how_it_works_lists_every_layer_and_file() -> None:
    page = (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (.+?) \| ", page, re.M)
    assert [int(layer) for layer, _ in rows] == list(range(len(LAYERS), 0, -1))
    assert [tuple(re.findall(r"`(\w+)/?`", packages)) for _, packages in rows] == list(reversed(LAYERS))
    sources = {path.relative_to(ROOT / "hf_usp").as_posix() for path in (ROOT / "hf_usp").rglob("*.py")}
    listed = re.findall(r"^([\w/]+\.py)  +\S", page, re.M)
    assert len(listed) == len(set(listed))
    assert set(listed) == {name for name in sources if not name.endswith("/__init__.py")}


# Names of the package before its parts were named after what PyTorch, FlashAttention and Transformers call them.
OLD_NAMES = re.compile(
    r"\b(?:integers|seams|costs|planning|core|recurrence)/\w"
    r"|\bhf_usp[./](?:integers|seams|costs|planning|core|report|recurrence)\b"
    r"|\b(?:class Layout|MaskKind|RingPlan|RingStage|ScanPlan|HaloPlan|StatePlan|StateWork)\b"
    r"|\b(?:ShardedForward|AcceleratorSeam)\b"
    r"|\b(?:UspReport|SameRun|KeepAttention|SumOfLosses|ChunkedForward|Garage|Steady|CutBody|RouterLoss)\b"
    r"|\b(?:find_body|whole_head|heads_to_tokens|tokens_to_heads|check_whole|last_complete|put_together|heed_failure)\b"
    r"|\b(?:cut_all|cut_labels|layout_of|differentiated_once|tell_failure|passed_on|needed_rows|deal_row|send_home)\b"
    r"|\b(?:q_edges|cu_q|by_row|by_hand|is_blank)\b|\b(?:dealing|scan_plan|footprint)\b"
    r"|\btickets?\b|\bseams?\b|\bdealt\b"
)
CODE = [
    path
    for folder in ("hf_usp", "scripts", "benchmarks", "tests", "configs")
    for path in sorted((ROOT / folder).rglob("*.*"))
]
TOLD = [*PAGES, *CODE, *(ROOT / "notebooks").glob("*.ipynb"), ROOT / "Makefile", ROOT / "mkdocs.yml"]
TOLD = [x for x in TOLD if x.suffix not in (".pyc", ".png") and x.name not in ("CHANGELOG.md", "test_docs.py")]
FILES = {path.relative_to(ROOT).as_posix() for path in TOLD} | {"tests/test_docs.py"}


@pytest.mark.parametrize("path", TOLD, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_old_names_are_gone(path: Path) -> None:
    """In code, docs and errors; names of files (decisions keep theirs) are no prose."""
    text = re.sub(r"\b\d{4}-[\w-]+\.md", "", path.read_text(encoding="utf-8"))
    found = [(text[: match.start()].count("\n") + 1, match.group()) for match in OLD_NAMES.finditer(text)]
    assert not found, found


@pytest.mark.parametrize(
    "path", [x for x in TOLD if x.suffix in (".md", ".py")], ids=lambda p: p.relative_to(ROOT).as_posix()
)
def test_no_sentence_begins_with_what(path: Path) -> None:
    """House English: the subject comes first. Questions and headings may."""
    text = path.read_text(encoding="utf-8")
    begins = re.finditer(r'(?:"""|^[ \t]*# |[.!;] |[.!]\n(?:[ \t]*# )?|^)What (?![^.:;]*\?)[^\n]*', text, re.M)
    assert not [match.group() for match in begins]


@pytest.mark.parametrize(
    "path", [x for x in TOLD if x.suffix in (".md", ".py")], ids=lambda p: p.relative_to(ROOT).as_posix()
)
def test_files_that_are_named_exist(path: Path) -> None:
    for name in re.findall(r"(?<![\w/.-])((?:\w+/)*\w+\.py)\b", path.read_text(encoding="utf-8")):
        if name.startswith(("hf_usp/", "tests/", "scripts/")) or path.parent.parts[-1:] == ("docs",):
            known = any(f"/{file}".endswith(f"/{name}") for file in FILES)
            assert known or name in OF_OTHERS, name


def reference() -> list[str]:
    """Names in docs/api.md, without the leading hf_usp."""
    return re.findall(r"^::: hf_usp\.(\S+)$", (ROOT / "docs" / "api.md").read_text(), re.M)


def told_to_use(text: str) -> set[str]:
    """Names of ours that a page imports, or mentions with their whole path."""
    imported = re.findall(r"^ *from hf_usp(\S*) import ([\w, ]+)", text, re.M)
    whole = {f"{module}.{name.strip()}"[1:] for module, names in imported for name in names.split(",")}
    return whole | set(re.findall(r"\bhf_usp\.((?:[a-z_]+\.)*\w+)", re.sub(r"from hf_usp\S* import", "", text)))


def test_the_reference_has_what_pages_tell_to_use() -> None:
    """README, all pages but those on the insides and on the past, and the notebooks."""
    inside = ("how-it-works.md", "CHANGELOG.md")
    pages = [page for page in PAGES if page.parent.name != "decisions" and page.name not in inside]
    texts = {page.name: page.read_text(encoding="utf-8") for page in pages}
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        texts[notebook.name] = "\n".join("".join(cell["source"]) for cell in cells)
    used = {name: page for page, text in texts.items() for name in told_to_use(text)}
    assert {"callbacks.checkpoint.get_last_complete_checkpoint", "shard"} <= set(used)
    assert not {name: page for name, page in used.items() if name not in reference()}


def test_the_reference_has_every_public_name() -> None:
    """And every name there exists: mkdocstrings reads the docstrings."""
    named = reference()
    assert set(hf_usp.__all__) <= set(named)
    for name in named:
        module, _, attribute = f"hf_usp.{name}".rpartition(".")
        assert getattr(importlib.import_module(module), attribute).__doc__, name


def test_troubleshooting_lists_every_class_of_errors() -> None:
    classes = {x.__name__ for x in vars(errors).values() if isinstance(x, type) and issubclass(x, errors.UspError)}
    table = re.findall(r"^\| `(Usp\w+)` \|", (ROOT / "docs" / "troubleshooting.md").read_text(), re.M)
    assert set(table) == classes - {"UspError"} and len(table) == len(set(table))


def test_troubleshooting_starts_from_texts_that_are_raised() -> None:
    """Every text of the first table is in the sources, between its dots."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    sources = "".join(p.read_text() for p in (ROOT / "hf_usp").rglob("*.py"))
    plain = re.sub(r'"\s*\n\s*f?"', "", sources).replace("{NAME!r}", "'usp'")
    texts = re.findall(r"^\| `(.+?)` \| ", page[: page.index("By the class")], re.M)
    assert len(texts) >= 10
    for text in texts:
        parts = [part.strip(" (.,)") for part in re.split(r"\.\.\.?|\(s\)|\(es\)", text)]
        missing = [part for part in parts if len(part) > 3 and part not in plain]
        assert not missing, (text, missing)


@pytest.mark.parametrize("page", recipes.PAGES, ids=lambda p: p.name)
def test_computed_tables_are_the_planner_s(page: Path) -> None:
    assert page.read_text(encoding="utf-8") == recipes.written(page), "python -m tests.planner.recipes writes it anew"
