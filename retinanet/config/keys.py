"""Names and types of the keys: find one by its dotted name, suggest the nearest, parse the text of a value.

A value is parsed after the type of its default, so that `1e-4`, `off` and `BN` mean what they say, in a file and on a
command line alike:

- True or False (any case) for a switch; nothing else, not even 0 or 1; the same texts where "auto" is a third choice;
- whole numbers for a whole number; whole numbers and decimals for a decimal;
- any text for a text, `''` for none; `None` and `null` are refused, because every key has a value;
- `(a, b)`, `[a, b]`, `a,b` or one lone value for a list; `()` for an empty one.
"""

import math
from difflib import get_close_matches

from yacs.config import CfgNode

from retinanet.errors import UserError


def all_keys(cfg: CfgNode, prefix: str = "") -> list[str]:
    """Return the dotted names of all values below `cfg`, in order."""
    names = []
    for name, value in cfg.items():
        names += all_keys(value, f"{prefix}{name}.") if isinstance(value, CfgNode) else [prefix + name]
    return names


def get_key(cfg: CfgNode, key: str):
    """Return the value or section of a dotted `key`; KeyError when there is none."""
    node = cfg
    for name in key.split("."):
        if not isinstance(node, CfgNode):
            raise KeyError(key)
        node = node[name]
    return node


def look_up(defaults: CfgNode, key: str, where: str):
    """Return the default value or section of `key`; `UserError` that names the nearest key when there is none."""
    try:
        return get_key(defaults, key)
    except KeyError:
        raise UserError(f"{key}: no such key ({where}){_suggest(defaults, key)}") from None


def parse_value(value: str | list | None, default, key: str, where: str):
    """Return `value` in the type of `default`: a text, a list of texts, or None for YAML's null.

    Raises `UserError` with the key, the value, its place, the type that is expected and the default.
    """
    try:
        if isinstance(default, (tuple, list)):
            items = value if isinstance(value, list) else _split(value)
            return type(default)(_parse_scalar(item, _element(default)) for item in items)
        return _parse_scalar(value, default)
    except ValueError:
        shown = "null" if value is None else repr(value)
        hint = f"; for none write {type(default)()!r}" if value in (None, "None") else ""
        message = f"{key}: {shown} is not {_expected(default)} ({where}){hint}; the default is {default!r}"
        raise UserError(message) from None


def unquote(text: str) -> str:
    """Return `text` without the quotes around it: shells leave those of `"''"`, the empty text."""
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text


def _suggest(defaults: CfgNode, key: str) -> str:
    """Return the nearest keys: siblings of the first unknown name, else keys whose last name is the same."""
    names, section, depth = key.split("."), defaults, 0
    while isinstance(section.get(names[depth]), CfgNode):
        section, depth = section[names[depth]], depth + 1
    wrong, rest = names[depth].upper(), names[depth + 1 :]
    upper = {name.upper(): name for name in section}
    close = get_close_matches(wrong, upper, n=1) or [name for name in upper if wrong in name.split("_")]
    siblings = [".".join([*names[:depth], upper[match]]) for match in close]
    known = all_keys(defaults)
    whole = [".".join([sibling, *rest]) for sibling in siblings]
    nearest = [name for name in whole if name in known] or siblings
    nearest = nearest or [name for name in known if name.split(".")[-1].upper() == names[-1].upper()]
    if nearest:
        return f"; did you mean {' or '.join(map(repr, nearest))}?"
    return f"; {'.'.join(names[:depth]) or 'the top level'} has {', '.join(section)}"


def _parse_scalar(value: str | list | None, default: bool | int | float | str):
    """Return the text `value` in the type of `default`, ValueError when it cannot be."""
    if not isinstance(value, str) or value == "None":
        raise ValueError
    if isinstance(default, str):
        third_choice = default == "auto" and value.lower() in ("true", "false")
        return value.capitalize() if third_choice else value
    if isinstance(default, bool):
        if value.lower() not in ("true", "false"):
            raise ValueError
        return value.lower() == "true"
    number = type(default)(value)
    if not math.isfinite(number):
        raise ValueError
    return number


def _split(text: str | None) -> list[str]:
    """Return the items of `(a, b)`, `[a, b]`, `a,b`, `a` or `()`."""
    if text is None:
        raise ValueError
    text = text.strip()
    if text[:1] + text[-1:] in ("()", "[]"):
        text = text[1:-1].strip()
    return [unquote(item.strip()) for item in text.removesuffix(",").split(",")] if text else []


def _element(default: tuple | list):
    """Return an example of an item; the lists that are empty by default hold texts."""
    return default[0] if default else ""


def _expected(default) -> str:
    if isinstance(default, (tuple, list)):
        return f"a list in which each item is {_expected(_element(default))}"
    if isinstance(default, bool):
        return "True or False"
    return {int: "a whole number", float: "a number", str: "a text"}[type(default)]
