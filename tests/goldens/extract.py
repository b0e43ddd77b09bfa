"""Writes tests/files/goldens: a small part of the reference runs, with the names and keys of the whole.

    PYTHONPATH=.:tests python tests/goldens/extract.py REFERENCES

REFERENCES is the folder that holds caffe2/, detectron2/ and torchvision/. Arrays of more than 1200 numbers become 250
samples, in the `idx` and `val` form that the references themselves use.
"""

import json
import sys
from pathlib import Path

import numpy as np
from goldens.reference import EXTRACTS

LARGEST, SAMPLES = 1200, 250
CAFFE2 = ["forward_base", "detections_base", "detections_synthetic", "train_base", "targets", "input"]
TORCH = {"detectron2": ["eval_a", "train_a"], "torchvision": ["v1_eval_a", "v1_train_a", "v2_eval_a", "v2_train_a"]}


def thin(name: str, array: np.ndarray) -> dict[str, np.ndarray]:
    """Return an array under its name, or samples of it; arrays that belong together (idx, val, det) stay whole."""
    if array.size <= LARGEST or name.startswith(("det", "it", "idx", "grad", "image", "a", "b")):
        return {name: array}
    places = np.sort(np.random.RandomState(0).permutation(array.size)[:SAMPLES]).astype(np.int32)
    return {f"{name}/idx": places, f"{name}/val": array.reshape(-1)[places]}


def sampled_scores(name: str, array: np.ndarray) -> dict[str, np.ndarray]:
    """Return a few of the 24000 class scores that the Caffe2 runs keep of a large level, with their places."""
    level = int(name.removesuffix("_sample")[-1])
    size = 720 * (128 >> level) * (256 >> level)
    places = np.sort(np.random.RandomState(level).permutation(size)[:24000])
    kept = np.sort(np.random.RandomState(0).permutation(24000)[:SAMPLES])
    blob = name.removesuffix("_sample")
    return {f"{blob}/idx": places[kept].astype(np.int32), f"{blob}/val": array[kept]}


def pairs(file: dict, name: str) -> dict[str, np.ndarray]:
    """Return the first samples of a tensor that the reference holds as idx and val already."""
    return {f"{name}/{part}": file[f"{name}/{part}"][:SAMPLES] for part in ("idx", "val")}


def extract(source: Path, target: Path) -> None:
    with np.load(source) as opened:
        file = dict(opened)
    out: dict[str, np.ndarray] = {}
    for name, array in file.items():
        if source.stem == "targets" and not name.startswith(("ab/gt", "ab/is")):
            continue
        if source.stem == "input" and name != "image_37x53":
            continue
        if name.endswith("_sample"):
            out |= sampled_scores(name, array)
        elif name.startswith(("logits", "deltas")) and name.endswith(("idx", "val")):
            out |= pairs(file, name.rpartition("/")[0])
        elif not name.startswith("anchors") or array.shape[0] <= 20:
            out |= thin(name, array)
    target.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(target, **out)


def shorten_cases(cases: dict, kept: list[str]) -> dict:
    """Return the numbers of the cases in `kept`, without the summaries of tensors that are not compared."""
    used = ("images", "boxes", "loss", "grad", "normalizer_after", "detections", "anchors", "padded_hw", "batched_hw")
    used += ("resized_hw", "min_size", "max_size", "steps", "l2_after", "lr", "momentum")
    used += ("weight_decay", "weight_decay_norm")
    return {name: {key: value for key, value in cases[name].items() if key in used} for name in kept}


def main(references: Path) -> None:
    for name in CAFFE2:
        extract(references / "caffe2" / f"{name}.npz", EXTRACTS / "caffe2" / f"{name}.npz")
    for name in ("forward_base.json", "train_base.json"):
        (EXTRACTS / "caffe2" / name).write_text((references / "caffe2" / name).read_text())
    for project, names in TORCH.items():
        folder, out = references / project, EXTRACTS / project
        for name in names:
            extract(folder / f"{name}.npz", out / f"{name}.npz")
        with np.load(folder / "images.npz") as images:
            used = ("a", "b") if project == "detectron2" else ("a",)  # its SGD steps take both
            np.savez_compressed(out / "images.npz", **{name: images[name] for name in used})
        for path in folder.glob("*state_dict.json"):
            (out / path.name).write_text(path.read_text())
        cases = json.loads((folder / "cases.json").read_text())
        if project == "detectron2":
            cases["cases"] = shorten_cases(cases["cases"], [*names, "sgd_ab"])
        for version, model in cases.get("models", {}).items():
            own = [name.removeprefix(f"{version}_") for name in names if name.startswith(version)]
            model["cases"] = shorten_cases(model["cases"], own)
        (out / "cases.json").write_text(json.dumps(cases))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
