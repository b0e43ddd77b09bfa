"""The doctor's command line: exit status, report, repaired copies, proposals, and messages instead of tracebacks."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from doctor_cases import clean, write_image, write_images, write_json

from retinanet.config import load_config
from retinanet.data.doctor import KINDS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path):
    write_images(tmp_path / "images")
    return tmp_path


def run(cwd, *arguments):
    """Return (exit status, standard output, standard error) of the tool, started in another folder."""
    command = [sys.executable, str(ROOT / "tools" / "check_dataset.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=300)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def call(monkeypatch, capsys):
    """The tool in this process, for what needs no process of its own."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import check_dataset

    from retinanet.errors import UserError

    def start(*arguments):
        try:
            check_dataset.main(list(map(str, arguments)))
            status, message = 0, ""
        except UserError as error:
            status, message = 2, str(error)
        return status, capsys.readouterr().out, message

    return start


def damaged() -> dict:
    content = clean()
    content["annotations"][0]["bbox"][2] = 0
    content["annotations"][13]["image_id"] = 99
    content["annotations"][14]["bbox"] = [-2, 3, 9, 9]
    return content


def test_clean_set_ends_with_status_0_and_damaged_one_with_2_without_traceback(folder):
    path = write_json(folder / "x.json", clean())
    status, out, _ = run(folder, "--annotations", path, "--images-dir", "images", "--images")
    assert status == 0 and "4 images" in out and "no errors" in out and "findings" not in out
    write_json(path, damaged())
    status, out, err = run("/", "--annotations", path, "--images-dir", folder / "images")
    assert status == 2 and "annotation 1000 (image 10)" in out
    assert err.strip().splitlines()[-1].startswith("error: 2 errors: unknown-image, degenerate-box; --fix OUT.json")


def test_help_shows_examples_and_exit_status(tmp_path):
    status, out, _ = run(tmp_path, "--help")
    assert status == 0 and "examples:" in out and "exit status" in out


def test_warnings_alone_are_no_failure(call, folder):
    content = clean()
    content["annotations"][14]["bbox"] = [-2, 3, 9, 9]
    status, out, _ = call("--annotations", write_json(folder / "x.json", content))
    assert status == 0 and "warning [partly-outside-box]" in out


def test_fix_writes_a_copy_says_each_change_and_leaves_the_input_alone(call, folder):
    path = write_json(folder / "x.json", damaged())
    before, fixed = path.read_bytes(), folder / "new" / "fixed.json"
    status, out, _ = call("--annotations", path, "--images-dir", folder / "images", "--fix", fixed)
    assert status == 0 and path.read_bytes() == before
    for change in ("[degenerate-box] 1 annotations", "[unknown-image] 1 annotations", "[partly-outside-box] 1 boxes"):
        assert change in out
    assert len(json.loads(fixed.read_text())["annotations"]) == 46
    status, out, _ = call("--annotations", fixed, "--fix", folder / "again.json")
    assert status == 0 and "nothing to repair" in out
    assert json.loads((folder / "again.json").read_text()) == json.loads(fixed.read_text())


def test_errors_that_remain_after_a_repair_end_with_status_2(call, folder):
    path = write_json(folder / "x.json", clean())
    status, out, message = call("--annotations", path, "--images-dir", folder / "no", "--fix", folder / "y.json")
    assert status == 2 and "images-dir" in message and (folder / "y.json").exists()


def test_json_report_names_every_id(call, folder):
    path = write_json(folder / "x.json", damaged())
    status, _, _ = call("--annotations", path, "--images-dir", folder / "images", "--json", folder / "report.json")
    report = json.loads((folder / "report.json").read_text())
    (one,) = report["datasets"]
    assert status == 2 and one["overview"]["boxes"] == 46
    found = {finding["kind"]: finding for finding in one["findings"]}
    assert found["degenerate-box"]["annotation_ids"] == [1000] and found["degenerate-box"]["image_ids"] == [10]
    assert found["unknown-image"]["annotation_ids"] == [1101]
    assert all(finding["severity"] == KINDS[finding["kind"]].severity for finding in one["findings"])
    assert report["anchors"]["coverage"]["all"]["boxes"] == 46 and report["between"] == []


@pytest.fixture
def config(folder):
    """A configuration of two sets, whose boxes are far smaller than the usual anchors."""
    generator = np.random.default_rng(0)
    for name, first in (("train", 0), ("val", 30)):
        images = [{"id": i, "file_name": f"{name}{i}.png", "width": 120, "height": 100} for i in range(30)]
        for image in images:
            write_image(folder / "images" / image["file_name"], 120, 100, first + image["id"])
        boxes = [[*generator.uniform(10, 80, 2).tolist(), *generator.uniform(9, 12, 2).tolist()] for _ in range(120)]
        annotations = [
            {"id": 1 + i, "image_id": i % 30, "category_id": 1 + i % 2, "bbox": box} for i, box in enumerate(boxes)
        ]
        content = {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": k, "name": "ab"[k - 1]} for k in (1, 2)],
        }
        write_json(folder / f"{name}.json", content)
    entries = [f"my_{name}: {{images: images, annotations: {name}.json}}" for name in ("train", "val")]
    (folder / "catalog.yaml").write_text("\n".join(entries))
    text = "DATASETS: {CATALOG: %s, TRAIN: [my_train], TEST: [my_val]}\n" % (folder / "catalog.yaml")
    (folder / "config.yaml").write_text(text + "INPUT: {MIN_SIZE_TEST: 100, MAX_SIZE_TEST: 200}\n")
    return folder / "config.yaml"


def test_configuration_names_the_sets_and_the_proposal_is_a_ready_configuration(call, folder, config):
    out_file = folder / "deep" / "anchors.yaml"
    status, out, _ = call("--config", config, "--images", "--propose", out_file)
    assert status == 0 and "my_train: " in out and "my_val: " in out and "warning [anchor-coverage]" in out
    proposed, given = load_config(out_file), load_config(config)
    assert proposed.MODEL.ANCHORS.SCALE < 2 and proposed.DATASETS.TRAIN == given.DATASETS.TRAIN
    line = next(line for line in out.splitlines() if line.strip().startswith("MODEL.ANCHORS.SCALE"))
    pairs = subprocess.run(["sh", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True, check=True)
    assert load_config(config, pairs.stdout.splitlines()).MODEL == proposed.MODEL
    status, out, _ = call("--config", out_file)
    assert status == 0 and "no other anchor setting" in out


def test_several_sets_are_repaired_into_a_folder(call, folder, config):
    status, _, message = call("--config", config, "--fix", folder / "one.json")
    assert status == 2 and "my_train, my_val" in message and not (folder / "one.json").exists()
    status, _, _ = call("--config", config, "--fix", folder / "fixed")
    assert status == 0 and sorted(path.name for path in (folder / "fixed").iterdir()) == [
        "my_train.json",
        "my_val.json",
    ]
    status, _, _ = call("--config", config, "--fix", folder / "one.json", "DATASETS.TEST", "()")
    assert status == 0 and (folder / "one.json").exists()


def test_a_set_outside_the_configuration_is_checked_with_its_keys(call, folder, config):
    path = write_json(folder / "x.json", clean())
    status, out, _ = call("--config", config, "--annotations", path, "MODEL.ANCHORS.SCALE", "3")
    assert status == 0 and "SCALE 3" in out and "my_train" not in out


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "give --config FILE, or --annotations FILE"),
        (("--images-dir", "x"), "--images-dir: goes with --annotations"),
        (("--annotations", "x.json", "--images"), "--images: needs --images-dir"),
        (("--annotations", "no.json"), "1 error: json"),
        (("--annotations", "x.json", "--fix", "x.json"), "never overwritten"),
        (("--annotations", "x.json", "--json", "x.json"), "never overwritten"),
        (("--annotations", "x.json", "--propose", "./x.json"), "never overwritten"),
        (("--config", "config.yaml", "--propose", "config.yaml"), "never overwritten"),
        (("--config", "config.yaml", "DATASETS.TRAIN", "()", "DATASETS.TEST", "()"), "nothing to check"),
        (("--config", "config.yaml", "DATASETS.TRAIN", "(my_trian,)"), "did you mean 'my_train'"),
        (("--annotations", "x.json", "MODEL.ANCHORS.SCALE", "-1"), "MODEL.ANCHORS.SCALE: -1.0 has to be from"),
        (("--annotations", "empty.json", "--propose", "p.yaml"), "no box to propose"),
        (("--annotations", "x.json", "--propose", "images"), "cannot be written"),
    ],
)
def test_mistakes_end_with_one_clear_message(call, folder, config, monkeypatch, arguments, message):
    monkeypatch.chdir(folder)
    write_json(folder / "x.json", clean())
    write_json(folder / "empty.json", clean() | {"annotations": []})
    before = (folder / "x.json").read_bytes(), config.read_bytes()
    status, _, said = call(*arguments)
    assert status == 2 and message in said
    assert before == ((folder / "x.json").read_bytes(), config.read_bytes())


def test_every_kind_of_finding_is_documented():
    text = (ROOT / "docs" / "datasets.md").read_text(encoding="utf-8")
    for kind, (severity, fix) in KINDS.items():
        assert f"| `{kind}` | {severity} |" in text, kind
        assert not fix or fix in text, f"{kind}: what --fix does"
