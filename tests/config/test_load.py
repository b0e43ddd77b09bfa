"""Configuration files and KEY VALUE pairs: what is accepted, and that every mistake names key, place and remedy."""

import string

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from retinanet.config import dump_config, get_cfg, load_config
from retinanet.config.keys import all_keys, get_key
from retinanet.config.load import ROOT, load_config_text, resolve_path
from retinanet.errors import UserError


def write(folder, name: str, text: str):
    (folder / name).write_text(text)
    return folder / name


def message(call, *args) -> str:
    with pytest.raises(UserError) as caught:
        call(*args)
    return str(caught.value)


def from_text(text: str, *opts: str):
    return load_config_text(text, "x.yaml", opts)


def test_without_settings_the_defaults_hold():
    assert from_text("") == get_cfg() == from_text("# only a comment\n") == from_text("MODEL:\n")


def test_loaded_config_is_frozen():
    assert from_text("").is_frozen()


def test_later_settings_win_base_then_file_then_command_line(tmp_path):
    write(tmp_path, "grand.yaml", "SOLVER: {BASE_LR: 1, MAX_ITER: 1, GAMMA: 1}\nSEED: 1")
    (tmp_path / "sub").mkdir()
    write(tmp_path, "sub/base.yaml", "_BASE_: ../grand.yaml\nSOLVER: {BASE_LR: 2, MAX_ITER: 2}")
    path = write(tmp_path, "own.yaml", "SOLVER:\n  BASE_LR: 3\n_BASE_: sub/base.yaml\n")
    cfg = load_config(path, ["SEED", "4"])
    assert (cfg.SOLVER.GAMMA, cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR, cfg.SEED) == (1, 2, 3, 4)


def test_base_files_in_a_circle_are_named(tmp_path):
    write(tmp_path, "b.yaml", "_BASE_: a.yaml")
    text = message(load_config, write(tmp_path, "a.yaml", "_BASE_: b.yaml"))
    assert "circle" in text
    assert text.index("a.yaml") < text.index("b.yaml") < text.rindex("a.yaml")


def test_missing_base_names_both_files(tmp_path):
    text = message(load_config, write(tmp_path, "a.yaml", "_BASE_: gone.yaml"))
    assert "gone.yaml" in text
    assert "a.yaml" in text


def test_missing_file_offers_the_nearest_in_its_folder(tmp_path):
    write(tmp_path, "quickstart.yaml", "")
    assert "did you mean 'quickstart.yaml'?" in message(load_config, tmp_path / "quikstart.yaml")


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("SOLVER: {BASE_LR: 1e-4}", "SOLVER.BASE_LR", 1e-4),  # YAML 1.1 reads a text here
        ("SOLVER: {BASE_LR: 1}", "SOLVER.BASE_LR", 1.0),
        ("SOLVER: {AMP: off}", "SOLVER.AMP", "off"),  # YAML 1.1 reads False here
        ("OUTPUT_DIR: 2024", "OUTPUT_DIR", "2024"),
        ("SOLVER.STEPS: [10, 20]", "SOLVER.STEPS", (10, 20)),
        ('DATASETS:\n  TRAIN: ("a", "b",)', "DATASETS.TRAIN", ("a", "b")),  # as Detectron's files write it
        ("DATASETS: {TRAIN: my_set}", "DATASETS.TRAIN", ("my_set",)),
        ("DATASETS: {TEST: []}", "DATASETS.TEST", ()),
        ("MODEL: {PIXEL_MEAN: [1, 2, 3.5]}", "MODEL.PIXEL_MEAN", [1.0, 2.0, 3.5]),
        ("DETERMINISTIC: true", "DETERMINISTIC", True),
    ],
)
def test_file_values_take_the_type_of_the_default(text, key, value):
    found = get_key(from_text(text), key)
    assert found == value
    assert type(found) is type(get_key(get_cfg(), key))


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("SOLVER.BASE_LR", "1e-4", 1e-4),
        ("MODEL.WEIGHTS", "123", "123"),
        ("MODEL.FPN.NORM", "''", ""),
        ("MODEL.FPN.NORM", "", ""),
        ("SOLVER.STEPS", "(10,)", (10,)),
        ("SOLVER.STEPS", "10,20", (10, 20)),
        ("SOLVER.STEPS", "()", ()),
        ("DATASETS.TRAIN", "my_set", ("my_set",)),
        ("DATASETS.TRAIN", "('a', 'b')", ("a", "b")),
        ("DETERMINISTIC", "True", True),
    ],
)
def test_command_line_values_take_the_type_of_the_default(key, text, value):
    assert get_key(from_text("", key, text), key) == value


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("SOLVER: {MAX_ITER: many}", ["SOLVER.MAX_ITER", "'many'", "a whole number", "x.yaml, line 1", "90000"]),
        ("SEED: 0\nSOLVER:\n  MAX_ITER: 1.5", ["SOLVER.MAX_ITER", "'1.5'", "a whole number", "x.yaml, line 3"]),
        ("SOLVER: {BASE_LR: fast}", ["SOLVER.BASE_LR", "'fast'", "a number"]),
        ("SOLVER: {BASE_LR: nan}", ["SOLVER.BASE_LR", "'nan'", "a number"]),
        ("SOLVER: {BASE_LR: [1, 2]}", ["SOLVER.BASE_LR", "['1', '2']", "a number"]),
        ("DETERMINISTIC: 1", ["DETERMINISTIC", "'1'", "True or False"]),
        ("DETERMINISTIC: yes", ["DETERMINISTIC", "'yes'", "True or False"]),
        ("SOLVER: {STEPS: [1, b]}", ["SOLVER.STEPS", "a list in which each item is a whole number"]),
        ("SOLVER: {STEPS: [[1], 2]}", ["SOLVER.STEPS", "flat list"]),
        ("MODEL: {WEIGHTS: null}", ["MODEL.WEIGHTS", "null", "for none write ''"]),
        ("MODEL: {WEIGHTS: None}", ["MODEL.WEIGHTS", "'None'", "for none write ''"]),
        ("DATASETS: {TEST: None}", ["DATASETS.TEST", "'None'", "for none write ()"]),
        ("MODEL: {FPN: GN}", ["MODEL.FPN", "section", "NORM, CONV, CHANNELS, P6_FROM"]),
        ("MODEL: {WEIGHTS: {A: 1}}", ["MODEL.WEIGHTS", "nested"]),
        ("SEED: 1\nSEED: 2", ["SEED", "twice", "line 1", "line 2"]),
        ("MODEL: {FPN: {NORM: GN", ["x.yaml, line 1", "not valid YAML"]),
        ("- a\n- b", ["x.yaml", "KEY: value"]),
        ("5", ["x.yaml", "KEY: value"]),
        ("1: 2", ["1: no such key"]),
        ("[1]: 2", ["line 1", "one word"]),
        ("_BASE_: a.yaml", ["_BASE_"]),  # a text has no folder that a base could lie in
        ("MODEL: &a {FPN: *a}", ["MODEL.FPN.FPN", "no such key"]),
        ("&a [*a]", ["x.yaml", "KEY: value"]),
        ("[" * 5000, ["x.yaml", "not valid YAML"]),
        ("SEED: !!python/object/apply:os.getcwd []", ["SEED", "a whole number"]),
    ],
)
def test_mistakes_in_a_file_name_key_value_type_and_place(text, parts):
    found = message(from_text, text)
    assert all(part in found for part in parts), found


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("MODEL.FPN.NROM", "did you mean 'MODEL.FPN.NORM'?"),
        ("MODEL.FNP.NORM", "did you mean 'MODEL.FPN.NORM'?"),
        ("model.fpn.norm", "did you mean 'MODEL'?"),
        ("SOLVER.LR", "did you mean 'SOLVER.BASE_LR' or 'SOLVER.BIAS_LR_FACTOR'?"),
        ("TEST.NMS", "did you mean 'TEST.NMS_IOU'"),
        ("TEST.WEIGHTS", "did you mean 'MODEL.WEIGHTS'?"),
        ("MODEL.RETINANET.NUM_CLASSES", "did you mean 'MODEL.NUM_CLASSES'?"),
        ("SEED.X", "did you mean 'SEED'?"),
        ("MODEL.FPN.XYZ", "MODEL.FPN has NORM, CONV, CHANNELS, P6_FROM"),
        ("XYZ", "the top level has OUTPUT_DIR"),
    ],
)
def test_unknown_keys_name_the_nearest(key, hint):
    found = message(from_text, "", key, "1")
    assert found.startswith(f"{key}: no such key (command line)")
    assert hint in found


def test_unknown_key_in_a_file_names_file_and_line(tmp_path):
    path = write(tmp_path, "x.yaml", "MODEL:\n  FPN:\n    NROM: GN\n")
    found = message(load_config, path)
    assert found == f"MODEL.FPN.NROM: no such key ({path}, line 3); did you mean 'MODEL.FPN.NORM'?"


def test_odd_command_line_names_the_lonely_word():
    assert "'SEED' stands alone" in message(from_text, "", "SOLVER.BASE_LR", "1", "SEED")


def test_section_on_the_command_line_lists_its_keys():
    assert "set one of MODEL.FPN.NORM" in message(from_text, "", "MODEL.FPN", "GN")


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"\x00\x01", None])
def test_unreadable_files_are_user_errors(tmp_path, content):
    path = tmp_path / "x.yaml"
    path.mkdir() if content is None else path.write_bytes(content)
    assert "x.yaml" in message(load_config, path)


def test_dump_holds_every_key_and_loads_to_an_equal_config():
    cfg = from_text("SOLVER: {BASE_LR: 1.0e-5, STEPS: [], AMP: off}\nOUTPUT_DIR: 'a: b # c'\nDATASETS: {TEST: [é, '']}")
    text = dump_config(cfg)
    assert from_text(text) == cfg
    assert all(str(key.split(".")[-1]) in text for key in all_keys(cfg))


def test_dump_means_the_same_to_any_yaml_reader():
    plain = yaml.safe_load(dump_config(from_text("SOLVER: {AMP: off}")))
    assert plain["SOLVER"]["AMP"] == "off"
    assert plain["SOLVER"]["STEPS"] == [60000, 80000]
    assert plain["SOLVER"]["WARMUP_FACTOR"] == 1.0 / 3


def _values(default):
    if isinstance(default, bool):
        return st.booleans()
    if isinstance(default, int):
        return st.integers()
    if isinstance(default, float):
        return st.floats(allow_nan=False, allow_infinity=False)
    if isinstance(default, str):
        return st.text(alphabet=string.printable + "éñ中").filter(lambda text: text != "None")
    return st.lists(_values(default[0] if default else ""), max_size=4).map(type(default))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_config_survives_dump_and_load(data):
    cfg = get_cfg()
    for key in data.draw(st.lists(st.sampled_from(all_keys(cfg)), max_size=8, unique=True)):
        section, _, name = key.rpartition(".")
        (get_key(cfg, section) if section else cfg)[name] = data.draw(_values(get_key(cfg, key)))
    assert from_text(dump_config(cfg)) == cfg


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet=string.printable, max_size=80), st.sampled_from(["", "MODEL:\n  ", "SEED: ", "_BASE_: "]))
def test_any_text_loads_or_is_a_user_error(text, start):
    try:
        assert from_text(start + text).is_frozen()
    except UserError as error:
        assert str(error)


def test_relative_path_is_found_in_the_working_directory_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_path("pyproject.toml") == ROOT / "pyproject.toml"
    write(tmp_path, "pyproject.toml", "")
    assert resolve_path("pyproject.toml").resolve() == tmp_path / "pyproject.toml"
    assert str(resolve_path("nowhere/x.yaml")) == "nowhere/x.yaml"
