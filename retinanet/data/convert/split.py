"""One COCO json -> training and validation, image by image."""

import re

import numpy as np

from retinanet.errors import UserError


def split_images(content: dict, share: float, seed: int = 0, group_by: str = "") -> tuple[dict, dict, list[str]]:
    """Return the training and the validation part of a COCO json, and notes for the user.

    share: of the images that goes to validation, between 0 and 1; each side gets an image at least. The same seed gives
    the same parts. Every class that occurs in two groups or more occurs on both sides, for as long as the share leaves
    room; beyond that images are drawn.
    group_by: a regular expression; images for which its first group (or all of it) matches the same text, frames of a
    video for example, go to the same side. An image that it does not match is a `UserError`.
    """
    if not 0 < share < 1:
        raise UserError(f"the share of validation is {share:g}; give a number between 0 and 1")
    images = content["images"]
    groups = _groups(images, group_by)
    if len(groups) < 2:
        raise UserError(f"{len(images)} images in {len(groups)} group cannot be split in two")
    members = list(groups.values())
    classes = _classes(content, members)
    wanted = min(max(round(share * len(images)), 1), len(images) - 1)
    side = _assign(members, classes, wanted, np.random.default_rng(seed))
    chosen = {images[i]["id"] for group, is_val in zip(members, side, strict=True) if is_val for i in group}
    parts = [_part(content, chosen, keep) for keep in (False, True)]
    return *parts, _notes(content, classes, side)


def _groups(images: list[dict], group_by: str) -> dict[str, list[int]]:
    """Return key -> positions of its images, in the order of the file."""
    try:
        pattern = re.compile(group_by)
    except re.error as error:
        raise UserError(f"{group_by!r} is no regular expression ({error})") from error
    groups: dict[str, list[int]] = {}
    for position, image in enumerate(images):
        found = pattern.search(str(image["file_name"])) if group_by else None
        if group_by and not found:
            raise UserError(f"{group_by!r} does not match the image {image['file_name']!r}")
        key = (found.group(1) if pattern.groups else found.group()) if found else str(position)
        groups.setdefault(key, []).append(position)
    return groups


def _classes(content: dict, members: list[list[int]]) -> list[set[int]]:
    """Return the category ids that occur in each group; crowds are no examples of their class."""
    owner = {content["images"][i]["id"]: number for number, group in enumerate(members) for i in group}
    classes: list[set[int]] = [set() for _ in members]
    for record in content["annotations"]:
        if not record.get("iscrowd"):
            classes[owner[record["image_id"]]].add(record["category_id"])
    return classes


def _assign(members: list[list[int]], classes: list[set[int]], wanted: int, generator) -> list[bool]:
    """Return for each group whether it is for validation: rare classes first, then by lot until `wanted` images."""
    order = generator.permutation(len(members)).tolist()
    side: dict[int, bool] = {}
    holders = {label: [i for i in order if label in classes[i]] for label in set().union(*classes)}
    room = {True: wanted, False: sum(map(len, members)) - wanted}
    for label in sorted(holders, key=lambda one: (len(holders[one]), one)):
        for is_val in (True, False):
            if len(holders[label]) < 2 or any(side.get(i) == is_val for i in holders[label]):
                continue
            free = [i for i in holders[label] if i not in side and len(members[i]) <= room[is_val]]
            if free:
                side[free[0]] = is_val
                room[is_val] -= len(members[free[0]])
    for i in order:
        if i not in side:
            side[i] = room[True] >= len(members[i]) or (room[False] < len(members[i]) and room[True] > room[False])
            room[side[i]] -= len(members[i])
    if len(set(side.values())) == 1:  # one large group, or a share that no group fits into: the smallest changes sides
        smallest = min(side, key=lambda i: len(members[i]))
        side[smallest] = not side[smallest]
    return [side[i] for i in range(len(members))]


def _part(content: dict, chosen: set, keep: bool) -> dict:
    """Return a copy with the images whose id is in `chosen` (keep) or is not, with all categories."""
    images = [image for image in content["images"] if (image["id"] in chosen) == keep]
    annotations = [record for record in content["annotations"] if (record["image_id"] in chosen) == keep]
    return {**content, "images": images, "annotations": annotations}


def _notes(content: dict, classes: list[set[int]], side: list[bool]) -> list[str]:
    names = {entry["id"]: entry["name"] for entry in content["categories"]}
    notes = []
    for is_val, where in ((False, "training"), (True, "validation")):
        there = set().union(*(found for found, one in zip(classes, side, strict=True) if one == is_val))
        lacking = sorted(names[label] for label in set().union(*classes) - there)
        if lacking:
            notes.append(f"{where} has no box of {', '.join(lacking)}: too few images or groups hold them")
    return notes
