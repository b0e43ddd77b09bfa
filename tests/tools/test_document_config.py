"""docs/configuration.md says what the code does."""

import sys
from pathlib import Path

import pytest

from retinanet.config import batch_recipe, get_cfg
from retinanet.config.keys import all_keys, get_key
from retinanet.config.load import load_config_text
from retinanet.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "configuration.md").read_text()


@pytest.fixture(scope="module")
def tool():
    sys.path.insert(0, str(ROOT / "tools"))
    import document_config

    yield document_config
    sys.path.remove(str(ROOT / "tools"))


def test_page_is_current(tool):
    assert tool.updated(PAGE, tool.SOURCE.read_text()) == PAGE, "run: python tools/document_config.py"


def test_every_key_has_a_comment(tool):
    comments = tool.comments(tool.SOURCE.read_text())
    assert [key for key in all_keys(get_cfg()) if not comments[key]] == []


def test_comment_lines_that_follow_belong_to_their_key(tool):
    found = tool.comments("_C.A = 1  # one,\n# two\n_C.B = CN()\n\n# three\n_C.B.C = '#'  # four")
    assert found == {"A": "one, two", "B": "", "B.C": "four"}


def test_errors_on_the_page_are_those_of_the_code():
    for text, opts in (("\n\nMODEL.FPN.NROM: GN", []), ("", ["SOLVER.MAX_ITER", "many"])):
        with pytest.raises(UserError) as caught:
            load_config_text(text, "configs/x.yaml", opts)
        assert f"error: {caught.value}\n" in PAGE


def test_recipe_on_the_page_is_that_of_the_code():
    cfg = load_config_text("", "test", ["SOLVER.IMS_PER_BATCH", "2"])
    recipe = batch_recipe(cfg)
    for key in ("SOLVER.BASE_LR", "SOLVER.MAX_ITER", "SOLVER.STEPS", "SOLVER.WARMUP_ITERS"):
        assert f"| `{key}` | {get_key(cfg, key)} | {getattr(recipe, key.split('.')[1].lower())} |" in PAGE
