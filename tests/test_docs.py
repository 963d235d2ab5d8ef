"""The documentation: no broken link, every Python block is Python, and those that need nothing else run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
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
