"""Write the tables of docs/configuration.md from the comments in retinanet/config/defaults.py."""

import re

import _cli

from retinanet.config import get_cfg
from retinanet.config.keys import all_keys, get_key

EXAMPLES = "  python tools/document_config.py"
SOURCE = _cli.ROOT / "retinanet" / "config" / "defaults.py"
PAGE = _cli.ROOT / "docs" / "configuration.md"
START, END = "<!-- tables: written by tools/document_config.py -->\n", "<!-- end of tables -->\n"


def comments(source: str) -> dict[str, str]:
    """Return dotted key -> its comment; comment lines that follow the key's line go on with it."""
    found, key = {}, None
    for line in source.splitlines():
        assignment = re.match(r"_C\.([\w.]+) = .*?(?:  # (.*))?$", line)
        if assignment:
            key = assignment[1]
            found[key] = assignment[2] or ""
        elif line.startswith("# ") and key:
            found[key] += " " + line[2:]
        else:
            key = None
    return found


def tables(source: str) -> str:
    """Return one table for each section, keys in the order of `defaults.py`."""
    cfg, meaning, lines, section = get_cfg(), comments(source), [], None
    for key in all_keys(cfg):
        own = key.rpartition(".")[0] or "Run"
        if own != section:
            section = own
            note = f"\n{meaning[own]}\n" if meaning.get(own) else ""
            lines += ["", f"### {own}", *([note] if note else [""]), "| key | default | meaning |", "|---|---|---|"]
        default = f"`{get_key(cfg, key)!r}`".replace("``", "` `")
        lines.append(f"| `{key}` | {default} | {meaning[key].replace('|', chr(92) + '|')} |")
    return "\n".join(lines[1:]) + "\n"


def updated(page: str, source: str) -> str:
    """Return `page` with the tables between its two marks written anew."""
    before, rest = page.split(START)
    return before + START + "\n" + tables(source) + "\n" + END + rest.split(END)[1]


def main() -> None:
    _cli.parse(_cli.parser(__doc__, EXAMPLES, config=False))
    PAGE.write_text(updated(PAGE.read_text(), SOURCE.read_text()))
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    _cli.run(main)
