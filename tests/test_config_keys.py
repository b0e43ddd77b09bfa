"""Every key of the configuration has a reader: a key that nothing reads is a promise that nothing keeps."""

import ast
import inspect
import re
from pathlib import Path

import pytest

from retinanet.config import get_cfg
from retinanet.config.keys import all_keys
from retinanet.layers.norm import NORMS

ROOT = Path(__file__).resolve().parent.parent
NOT_READERS = {ROOT / "retinanet/config" / name for name in ("check.py", "defaults.py", "keys.py", "load.py")}
FILES = sorted({*(ROOT / "retinanet").rglob("*.py"), *(ROOT / "tools").glob("*.py")} - NOT_READERS)
OPTIONS = "MODEL.NORM_OPTIONS."


def chain(node: ast.AST, names: dict[str, tuple]) -> tuple[str, ...] | None:
    """Return the keys from `cfg` down to `node` as regular expressions, None when it does not start at `cfg`."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if not isinstance(node, (ast.Attribute, ast.Subscript)):
        return None
    base = chain(node.value, names)
    if base is None or (isinstance(node, ast.Subscript) and pattern(node.slice) is None):
        return None
    return (*base, node.attr if isinstance(node, ast.Attribute) else pattern(node.slice))


def pattern(index: ast.AST) -> str | None:
    """Return what an index can be: a text itself, any name for a variable, a mix for an f-string; None for a number."""
    if isinstance(index, ast.JoinedStr):
        return "".join(pattern(value) for value in index.values)
    if isinstance(index, ast.Constant):
        return index.value if isinstance(index.value, str) else None
    return None if isinstance(index, ast.Slice) else r"\w+"


def reads(tree: ast.AST) -> set[tuple[str, ...]]:
    """Return the chains that `tree` reads, local names such as `solver = cfg.SOLVER` followed."""
    found = set()
    for function in [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.Lambda))]:
        names = {"cfg": ()}
        for node in ast.walk(function):
            if isinstance(node, ast.Assign):
                targets, values = (getattr(side, "elts", [side]) for side in (node.targets[0], node.value))
                for target, value in zip(targets, values, strict=False):
                    if isinstance(target, ast.Name) and chain(value, names) is not None:
                        names[target.id] = chain(value, names)
        chains = (chain(node, names) for node in ast.walk(function))
        found |= {keys for keys in chains if keys}
    return found


KEYS = all_keys(get_cfg())
SECTIONS = {".".join(key.split(".")[:depth]) for key in KEYS for depth in range(1, key.count(".") + 1)}
READS = {".".join(keys).replace(".", r"\.") for file in FILES for keys in reads(ast.parse(file.read_text()))}


def matches(read: str, names) -> bool:
    return any(re.fullmatch(read, name) for name in names)


@pytest.mark.parametrize("key", [key for key in KEYS if not key.startswith(OPTIONS)])
def test_key_has_a_reader(key):
    readers = [read for read in READS if re.fullmatch(read, key)]
    # `cfg.MODEL[part]` picks a section: it reads none of the values that happen to lie beside the sections
    assert any(r"\w" not in read or not matches(read, SECTIONS) for read in readers), f"nothing reads {key}"


@pytest.mark.parametrize("key", [key for key in KEYS if key.startswith(OPTIONS)])
def test_norm_option_is_an_argument_of_its_norm(key):
    norm, option = key.removeprefix(OPTIONS).split(".")
    assert option.lower() in inspect.signature(NORMS[norm]).parameters


def test_norm_options_are_read_as_a_whole():
    assert r"MODEL\.NORM_OPTIONS" in READS


def test_all_that_is_read_exists():
    methods = r"(.*\.)?(clone|defrost|dump|freeze|get|is_frozen|items|keys)"
    wrong = {read for read in READS if not matches(read, [*KEYS, *SECTIONS]) and not re.fullmatch(methods, read)}
    assert not wrong


def test_local_names_indices_and_tuples_are_followed():
    code = """def build_x(cfg, part, split):
        solver, other = cfg.SOLVER, cfg.INPUT
        return solver.GAMMA, other[f"MIN_{split}"], cfg.MODEL[part].NORM, part.NOT"""
    found = {".".join(keys) for keys in reads(ast.parse(code))}
    assert {"SOLVER.GAMMA", r"INPUT.MIN_\w+", r"MODEL.\w+.NORM"} <= found
    assert not any("NOT" in read for read in found)
