"""The documents' code blocks and links, as data."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
_HEADS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "deploy/README.md", "deploy/demo_model/README.md")
PAGES = (*(ROOT / name for name in _HEADS), *sorted((ROOT / "docs").glob("*.md")))
COMMANDS = ("bash", "python")
"""Languages of blocks that are run; the info string may say `no-test: why not` behind it."""
TEXTS = ("text", "yaml", "json", "toml", "promql")
"""Languages of blocks that show something."""
_FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class CodeBlock:
    """A fenced block of a document."""

    page: Path
    line: int
    info: str
    text: str

    @property
    def language(self) -> str:
        return self.info.partition(" ")[0]

    @property
    def reason_not_to_run(self) -> str:
        _, mark, reason = self.info.partition(" no-test: ")
        return reason.strip() if mark else ""

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def code_blocks() -> list[CodeBlock]:
    """Of all pages, in order."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in _FENCE.finditer(text):
            found.append(CodeBlock(page, text.count("\n", 0, match.start()) + 1, match[1], match[2]))
    return found


def prose_of(page: Path) -> str:
    """The page without its code blocks."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors_of(page: Path) -> set[str]:
    """The anchors that GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.+)$", prose_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def rows_of(text: str, head: str) -> list[str]:
    """The rows of the table that begins with these lines."""
    _, found, after = text.partition(head)
    assert found, head
    rows = re.match(r"(\|.*\n)*", after)
    return rows[0].splitlines(keepends=True) if rows else []


def with_table(text: str, head: str, rows: Iterable[str]) -> str:
    """The text of a page with other rows in the table that begins with these lines."""
    before, found, after = text.partition(head)
    assert found, head
    return before + head + "".join(rows) + re.sub(r"\A(\|.*\n)*", "", after)
