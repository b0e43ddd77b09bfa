"""Configuration files: defaults <- `_BASE_` chain <- YAML file <- `KEY VALUE` pairs of a command line.

A key may be nested, as in `SOLVER: {BASE_LR: 0.1}`, or dotted, as in `SOLVER.BASE_LR: 0.1`; `keys.py` says what a value
may look like. Every mistake raises `UserError` with the full key, the value, file and line, and what is valid.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import yaml
from yacs.config import CfgNode

from retinanet.config.defaults import get_cfg
from retinanet.config.keys import get_key, look_up, parse_value, unquote
from retinanet.errors import UserError, nearest

ROOT = Path(__file__).resolve().parents[2]
BASE = "_BASE_"


class Setting(NamedTuple):
    """One key with its unparsed value (None: YAML's null) and the place that the messages name."""

    key: str
    value: str | list | None
    where: str


def load_config(path: str | Path, opts: Sequence[str] = ()) -> CfgNode:
    """Return the frozen configuration of the YAML file `path` with `opts` = [KEY, VALUE, ...] applied on top.

    A relative `path` is looked up as `resolve_path` says, a relative `_BASE_` beside the file that names it.
    """
    return _apply([*_read_file(resolve_path(path), ()), *_read_opts(opts)])


def load_config_text(text: str, source: str, opts: Sequence[str] = ()) -> CfgNode:
    """Return the frozen configuration of YAML `text`, as a checkpoint holds it; `source` names it in messages."""
    return _apply([*_read_text(text, source, ()), *_read_opts(opts)])


def dump_config(cfg: CfgNode) -> str:
    """Return `cfg` as YAML text with every key; `load_config_text` turns it into an equal configuration."""
    return yaml.dump(_plain(cfg), Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)


def resolve_path(path: str | Path) -> Path:
    """Return `path`, relative to the working directory if it exists there, else to the project's folder.

    So that `configs/x.yaml` and `datasets/catalog.yaml` are found from any directory.
    """
    path = Path(path).expanduser()
    in_project = ROOT / path
    return in_project if not path.exists() and in_project.exists() else path


def _apply(settings: Sequence[Setting]) -> CfgNode:
    cfg = get_cfg()
    for key, value, where in settings:
        section, _, name = key.rpartition(".")
        node = get_key(cfg, section) if section else cfg
        node[name] = parse_value(value, node[name], key, where)
    cfg.freeze()
    return cfg


def _read_opts(opts: Sequence[str]) -> list[Setting]:
    where = "command line"
    if len(opts) % 2:
        raise UserError(f"{where}: KEY VALUE pairs are expected, but {opts[-1]!r} stands alone in {' '.join(opts)!r}")
    settings, defaults = [], get_cfg()
    for key, value in zip(opts[::2], opts[1::2], strict=True):
        default = look_up(defaults, key, where)
        if isinstance(default, CfgNode):
            choices = ", ".join(f"{key}.{name}" for name in default)
            raise UserError(f"{key}: is a section ({where}); set one of {choices}")
        settings.append(Setting(key, unquote(value), where))
    return settings


def _read_file(path: Path, chain: tuple[Path, ...]) -> list[Setting]:
    """Return the settings of `path`, those of its `_BASE_` first; `chain` holds the files that led here."""
    real = path.resolve()
    if real in chain:
        raise UserError(f"{BASE}: files name each other in a circle: {' -> '.join(map(str, (*chain, real)))}")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        named_by = f" (named by {BASE} of {chain[-1]})" if chain else ""
        hint = "" if isinstance(error, PermissionError) else _nearest_file(path)
        raise UserError(f"config file {path}{named_by}: {error.strerror}{hint}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"config file {path}: is not UTF-8 text (byte {error.start})") from error
    return _read_text(text, str(path), (*chain, real))


def _nearest_file(path: Path) -> str:
    folder = path.parent if path.parent.is_dir() else ROOT / "configs"
    names = sorted(file.name for file in folder.glob("*.yaml"))
    return nearest(path.name, names) or (f"; {folder} has {', '.join(names)}" if names else "")


def _read_text(text: str, source: str, chain: tuple[Path, ...]) -> list[Setting]:
    root = _compose(text, source)
    if root is None or _is_null(root):
        return []
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{source}: holds no 'KEY: value' lines; see configs/ for examples")
    base = [value for name, value in root.value if name.value == BASE]
    root.value = [(name, value) for name, value in root.value if name.value != BASE]
    return [*_read_base(base, source, chain), *_walk(root, get_cfg(), "", source)]


def _compose(text: str, source: str) -> yaml.Node | None:
    """Return the tree of YAML nodes; nothing is constructed, so that no tag can run code."""
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{source}{place}: not valid YAML: {getattr(error, 'problem', None) or error}") from error
    except RecursionError as error:
        raise UserError(f"{source}: not valid YAML: nested too deeply") from error


def _read_base(nodes: list[yaml.Node], source: str, chain: tuple[Path, ...]) -> list[Setting]:
    if not nodes:
        return []
    if len(nodes) > 1 or not isinstance(nodes[0], yaml.ScalarNode) or not nodes[0].value or not chain:
        raise UserError(f"{source}: {BASE} has to name one YAML file, relative to the file that says so")
    return _read_file(chain[-1].parent / Path(nodes[0].value).expanduser(), chain)


def _walk(node: yaml.MappingNode, defaults: CfgNode, prefix: str, source: str) -> Iterator[Setting]:
    """Yield the settings below `node`; only known sections are entered, so that no cycle of aliases can trap it."""
    seen = {}
    for name, value in node.value:
        where = f"{source}, line {name.start_mark.line + 1}"
        if not isinstance(name, yaml.ScalarNode):
            raise UserError(f"{where}: a key has to be one word")
        key = prefix + name.value
        if key in seen:
            raise UserError(f"{key}: given twice ({seen[key]} and {where}); remove one")
        seen[key] = where
        default = look_up(defaults, key, where)
        if not isinstance(default, CfgNode):
            yield Setting(key, _text(value, key, where), where)
        elif isinstance(value, yaml.MappingNode):
            yield from _walk(value, defaults, f"{key}.", source)
        elif not _is_null(value):
            raise UserError(f"{key}: is a section ({where}); give it keys: {', '.join(default)}")


def _text(node: yaml.Node, key: str, where: str) -> str | list | None:
    """Return the text of a scalar, the texts of a list of scalars, or None for null."""
    if isinstance(node, yaml.ScalarNode):
        return None if _is_null(node) else node.value
    if isinstance(node, yaml.SequenceNode) and all(isinstance(item, yaml.ScalarNode) for item in node.value):
        return [None if _is_null(item) else item.value for item in node.value]
    raise UserError(f"{key}: has to be one value or a flat list of values, not a nested structure ({where})")


def _is_null(node: yaml.Node) -> bool:
    return node.tag == "tag:yaml.org,2002:null"


def _plain(value):
    if isinstance(value, CfgNode):
        return {name: _plain(below) for name, below in value.items()}
    return list(value) if isinstance(value, (tuple, list)) else value


class _Dumper(yaml.SafeDumper):
    """Writes lists on one line."""


_Dumper.add_representer(
    list, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=True)
)
