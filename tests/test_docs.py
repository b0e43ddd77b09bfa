"""What README and docs name exists: tools with their flags, configurations, keys, and other pages."""

import re
import shlex

import pytest
from conftest import ROOT

from retinanet.config.defaults import get_cfg
from retinanet.config.keys import get_key

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
COMMAND = re.compile(r"^(?:\$ )?(?:torchrun [^\n]*?|python )(tools/\w+\.py[^\n#]*)", re.MULTILINE)
FROM_ELSEWHERE = ("output/", "$")  # what earlier commands write, and what the shell fills in


def commands(page) -> list[list[str]]:
    """Return the words of every `python tools/...` command of a page, comments left out."""
    text = re.sub(r"\\\n\s*", " ", page.read_text(encoding="utf-8"))  # lines that go on
    return [shlex.split(found) for found in COMMAND.findall(text)]


def keys_in(words: list[str]) -> list[str]:
    return [word for word in words if re.fullmatch(r"(MODEL|DATASETS|INPUT|DATALOADER|SOLVER|TEST)(\.\w+)+", word)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_name_tools_configurations_and_keys_that_exist(page):
    for words in commands(page):
        assert (ROOT / words[0]).is_file(), words
        for flag, value in zip(words, words[1:], strict=False):
            if flag == "--config" and not value.startswith(FROM_ELSEWHERE) and value.startswith("configs/retinanet_"):
                assert (ROOT / value).is_file(), words
        for key in keys_in(words):
            get_key(get_cfg(), key)


def test_commands_use_flags_that_the_tools_have():
    flags = {}
    for page in PAGES:
        for tool, *words in commands(page):
            flags.setdefault(tool, set()).update(word for word in words if re.fullmatch(r"--[a-z][a-z-]*", word))
    shared = (ROOT / "tools/_cli.py").read_text()
    for tool, used in flags.items():
        source = shared + (ROOT / tool).read_text()
        assert not {flag for flag in used if f'"{flag}"' not in source}, tool


@pytest.mark.parametrize("page", [page for page in PAGES if page.name.startswith("migrate")], ids=lambda p: p.name)
def test_keys_of_the_migration_tables_exist(page):
    """Of the tables between "## Keys" or "## Arguments" and the next heading, the second column."""
    table = re.search(r"## (?:Keys|Arguments)\n(.*?)\n## ", page.read_text(encoding="utf-8"), re.DOTALL).group(1)
    rows = [line.split(" | ")[1] for line in table.splitlines() if line.startswith("|") and " | " in line]
    named = [
        name for row in rows for name in re.findall(r"\b(?:MODEL|DATASETS|INPUT|DATALOADER|SOLVER|TEST)\.[\w.]+", row)
    ]
    assert len(named) > 8
    for key in named:
        get_key(get_cfg(), key)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("http") or (page.parent / target).exists(), target
    for name in re.findall(r"`docs/(\w+\.md)`", text):
        assert (ROOT / "docs" / name).is_file(), name
