"""What the documents say is so: links lead somewhere, code blocks are run or say why not, names are the code's."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from kvstore.protocol import ExchangeTimeouts, messages
from services.settings.declare import names_of_all_services
from services.settings.vllm_flags import VLLM_FLAGS
from tests.configuration_page import PAGE, page
from tests.documents import COMMANDS, PAGES, ROOT, TEXTS, anchors_of, code_blocks, prose_of

PROTOCOL = ROOT / "docs" / "protocol.md"
# Of other programs.
FOREIGN_FLAGS = {
    "--base-url", "--kv-overlap-score-weight", "--max-local-prefill-length", "--router-mode", "--router-temperature",
    "--config", *(flag for row in VLLM_FLAGS for flag in row.flags),
}  # fmt: skip


def test_every_code_block_is_run_or_says_why_not() -> None:
    for block in code_blocks():
        assert block.language in (*COMMANDS, *TEXTS), f"{block}: name one of {(*COMMANDS, *TEXTS)}"
        if block.language in TEXTS:
            assert block.info == block.language, f"{block}: nothing to be run, and nothing to be excused"
        elif block.info != block.language:
            assert len(block.reason_not_to_run) >= 10, f"{block}: `{block.language} no-test: why not`"
    assert any(block.language == "bash" and not block.reason_not_to_run for block in code_blocks())


def test_fences_are_closed() -> None:
    for document in PAGES:
        num_fences = len(re.findall(r"^```", document.read_text(encoding="utf-8"), re.MULTILINE))
        assert num_fences == 2 * sum(block.page == document for block in code_blocks()), document.name


@pytest.mark.parametrize("document", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(document)):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        path = (document.parent / name).resolve() if name else document
        assert path.exists(), f"{document.name}: {target}"
        if anchor:
            assert anchor in anchors_of(path), f"{document.name}: {target}"


def test_the_readme_is_read_in_five_minutes() -> None:
    words = [word for word in (ROOT / "README.md").read_text(encoding="utf-8").split() if re.search(r"\w", word)]
    assert len(words) <= 950


def test_the_configuration_page_is_what_the_code_declares() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run `python -m tests.configuration_page`"


@pytest.mark.parametrize("name", ["operations.md", "from-vllm-or-dynamo.md", "protocol.md", "metrics.md"])
def test_flags_that_the_pages_name_exist(name: str) -> None:
    declared = {f"--{setting.replace('_', '-')}" for setting in names_of_all_services()}
    spelled = set(re.findall(r"`(--[a-z0-9-]+)`", PAGE.read_text(encoding="utf-8")))
    named = set(re.findall(r"`(--[a-z][a-z0-9-]+)", (ROOT / "docs" / name).read_text(encoding="utf-8")))
    assert named <= declared | spelled | FOREIGN_FLAGS, named - declared - spelled - FOREIGN_FLAGS


def test_the_protocol_page_names_every_message_and_deadline() -> None:
    text = PROTOCOL.read_text(encoding="utf-8")
    kinds = [*messages.HandshakeMessage.__args__, *messages.ReaderMessage.__args__, *messages.OwnerMessage.__args__]
    for kind in kinds:
        assert f"`{kind.__struct_config__.tag}`" in text, kind.__name__
    rows = dict(re.findall(r"^\| `(\w+_s)` \| ([\d.]+) \|", text, re.MULTILINE))
    assert rows == {field.name: f"{field.default:g}" for field in dataclasses.fields(ExchangeTimeouts)}


def test_the_protocol_page_names_the_keys_in_redis() -> None:
    scripts = (ROOT / "kvstore" / "index" / "scripts.py").read_text(encoding="utf-8")
    keys = set(re.findall(r"^    (\{tandem\}:\S+) ", scripts, re.MULTILINE))
    assert len(keys) == 9
    rows = set(re.findall(r"^\| `(\{tandem\}:\S+)` \|", PROTOCOL.read_text(encoding="utf-8"), re.MULTILINE))
    assert rows == keys
