"""Detections made from annotations, with every kind of mistake that a detector makes; for tests of the metrics."""

import numpy as np


def coco_json(boxes: dict, names: dict, crowds=()) -> dict:
    """Return a minimal COCO json of `{image_id: [(category_id, x, y, w, h), ...]}`, without ids, areas or `iscrowd`.

    `crowds` holds the positions of the annotations that are crowds.
    """
    rows = [
        {"image_id": image_id, "category_id": category, "bbox": list(map(float, box))}
        for image_id, of_image in boxes.items()
        for category, *box in of_image
    ]
    for position in crowds:
        rows[position]["iscrowd"] = 1
    images = [{"id": image_id, "width": 100, "height": 100, "file_name": f"{image_id}.jpg"} for image_id in boxes]
    categories = [{"id": category, "name": name} for category, name in names.items()]
    return {"images": images, "categories": categories, "annotations": rows}


def detection(image_id, category_id, box, score) -> dict:
    return {"image_id": image_id, "category_id": category_id, "bbox": list(map(float, box)), "score": score}


def simulated(annotations: dict, seed: int, duplicates: int = 4, clutter: int = 20, crowded: int = 150) -> list[dict]:
    """Return jittered boxes (0 to `duplicates` of each, a tenth with a wrong class), `clutter` random boxes an image.

    The first image gets `crowded` more detections of one class. Scores have two decimals, so many are equal, and the
    order is random.
    """
    rng = np.random.default_rng(seed)
    categories = [category["id"] for category in annotations["categories"]]
    found = []
    for row in annotations["annotations"]:
        for _ in range(rng.integers(0, duplicates + 1)):
            box = np.abs(np.array(row["bbox"]) * (1 + rng.normal(0, 0.12, 4)))
            category = row["category_id"] if rng.random() > 0.1 else int(rng.choice(categories))
            found.append(detection(row["image_id"], category, box, round(float(rng.random()), 2)))
    first = annotations["images"][0]["id"]
    category = next(row["category_id"] for row in annotations["annotations"] if row["image_id"] == first)
    for image_id in [first] * crowded + [image["id"] for image in annotations["images"] for _ in range(clutter)]:
        label = category if len(found) % 2 else int(rng.choice(categories))
        found.append(detection(image_id, label, rng.random(4) * 300, round(float(rng.random()), 2)))
    return [found[index] for index in rng.permutation(len(found))]
