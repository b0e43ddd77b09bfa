"""What a run needs before it starts."""

from types import SimpleNamespace

import pytest

from retinanet.config.load import load_config_text
from retinanet.engine.run import hyperparameters, output_folder
from retinanet.errors import UserError


def test_the_output_folder_is_made(tmp_path):
    assert output_folder(SimpleNamespace(OUTPUT_DIR=str(tmp_path / "a" / "b"))).is_dir()


def test_an_output_folder_without_permission_is_named_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)  # the tests may run as root, who may write everywhere
    with pytest.raises(UserError, match="OUTPUT_DIR: no permission to write to .*; choose another folder"):
        output_folder(SimpleNamespace(OUTPUT_DIR=str(tmp_path)))


def test_hyperparameters_are_numbers_and_texts_under_the_names_of_their_keys():
    values = hyperparameters(load_config_text("", "test", ["SOLVER.BASE_LR", "0.02", "DATASETS.TRAIN", "a,b"]))
    assert values["SOLVER.BASE_LR"] == 0.02 and values["DATASETS.TRAIN"] == "('a', 'b')"
    assert {type(value) for value in values.values()} == {int, float, str} and "MODEL.FPN.NORM" in values
