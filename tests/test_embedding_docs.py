"""docs/embedding.md: its table, its index and the engines' pages agree."""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"
LINK = re.compile(r"\[[^]]+\]\((embedding/[\w-]+\.md)\)")


def rows() -> list[list[str]]:
    """The cells of the compatibility table's rows, without its head."""
    lines = [line for line in (DOCS / "embedding.md").read_text().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def pages() -> list[str]:
    return sorted(f"embedding/{path.name}" for path in (DOCS / "embedding").glob("*.md"))


def test_every_page_has_a_row_and_every_row_a_page():
    linked = [LINK.fullmatch(row[0]) for row in rows()]
    assert all(linked), "a row starts with a link to its engine's page"
    assert sorted(match[1] for match in linked if match) == pages()


def test_every_page_has_its_line_in_the_index():
    index = [line for line in (DOCS / "embedding.md").read_text().splitlines() if line.startswith("- ")]
    assert sorted(LINK.match(line[2:])[1] for line in index) == pages()  # type: ignore[index]  # no match fails too


def test_every_row_says_what_was_run_and_how():
    for row in rows():
        assert len(row) == 5, f"{row[0]}: engine, version run, works, does not work, how tested"
        assert all(row), f"{row[0]} leaves a cell empty"
        assert re.search(r"\d", row[1]), f"{row[0]} names no version"


def test_the_readme_names_the_index():
    assert "docs/embedding.md" in (DOCS.parent / "README.md").read_text()
