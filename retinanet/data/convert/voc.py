"""Pascal VOC xml -> COCO json.

VOC counts pixels from 1 and means the last one too: xmin 1, xmax 10 are ten columns. COCO's x, y, width, height are
continuous from 0, so x = xmin - 1 and width = xmax - xmin + 1. Many tools write xml that looks the same and holds plain
corners from 0; only their users can tell, so the convention is an argument.
Source: the VOC2012 development kit (`VOCdevkit/VOCcode/PASreadrecord.m`, section 4 of its guide).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from retinanet.data.convert.coco_file import IMAGE_SUFFIXES, CocoFile, check_names, image_size, read_text, some
from retinanet.errors import UserError, pick

# What corners mean -> (what is taken off xmin and ymin, what is added to xmax - xmin).
CORNERS = {"inclusive": (1, 1), "plain": (0, 0)}
# What becomes of `difficult` objects -> (whether they are kept, their iscrowd).
DIFFICULT = {"ignore": (True, True), "keep": (True, False), "drop": (False, False)}


class _Object(NamedTuple):
    name: str
    corners: tuple[float, float, float, float]
    difficult: bool


def convert_voc(
    annotations: Path,
    images: Path,
    image_set: Path | None = None,
    names: list[str] | None = None,
    difficult: str = "ignore",
    corners: str = "inclusive",
) -> CocoFile:
    """Return the xml files of a folder as a COCO json, in the order of their names or of the image set.

    annotations, images: folders. image_set: a file with a name a line, as in `ImageSets/Main`; what stands behind a
    blank there is not read, except -1, which excludes the image. names: the classes in their order; None: those that
    occur, by alphabet.
    difficult: "ignore" makes such objects crowds, which are not trained on and not counted in evaluation, as VOC's own
    does; "keep" ordinary boxes; "drop" nothing. corners: a key of `CORNERS`.
    Raises `UserError` that names file and object for everything that cannot be converted.
    """
    kept, is_crowd = pick(DIFFICULT, difficult, "difficult")
    low, extent = pick(CORNERS, corners, "corners")
    files = _files(annotations, image_set)
    records = [(file, *_read(file)) for file in files]
    found = sorted({one.name for _, _, objects in records for one in objects})
    made = CocoFile(check_names(names or found, "classes"), "Pascal VOC")
    unknown = [name for name in found if name not in made.ids]
    if unknown:
        raise UserError(f"classes: {some(unknown)} occur in {annotations} and are not among {', '.join(made.ids)}")
    unfit, number_difficult, other_names = [], 0, 0
    for file, root, objects in records:
        path, as_stated = _image_file(file, root, images)
        other_names += not as_stated
        made.add_image(path.relative_to(images).as_posix(), _size(root, path))
        for number, one in enumerate(objects, start=1):
            xmin, ymin, xmax, ymax = one.corners
            width, height = xmax - xmin + extent, ymax - ymin + extent
            if width <= 0 or height <= 0:
                unfit.append(f"{file.name} object {number} ({one.name}) has {xmin:g}, {ymin:g}, {xmax:g}, {ymax:g}")
            number_difficult += one.difficult
            if kept or not one.difficult:
                made.add_box(one.name, (xmin - low, ymin - low, width, height), one.difficult and is_crowd)
    if unfit:
        raise UserError(f"{annotations}: {len(unfit)} boxes without area: {some(unfit)}; correct the files")
    if number_difficult:
        made.notes.append(f"{number_difficult} difficult objects: {difficult}")
    if other_names:
        made.notes.append(f"{other_names} xml files state a filename that is not there; their own name was used")
    return made


def _files(annotations: Path, image_set: Path | None) -> list[Path]:
    if not annotations.is_dir():
        raise UserError(f"{annotations}: the folder of xml files does not exist")
    if image_set is None:
        files = sorted(annotations.glob("*.xml"))
        if not files:
            raise UserError(f"{annotations}: no xml files in this folder")
        return files
    files, missing = [], []
    for line in read_text(image_set).splitlines():
        name, *flag = line.split()[:2] or [""]
        if name and flag != ["-1"]:
            file = annotations / f"{name}.xml"
            (files if file.is_file() else missing).append(file)
    if missing:
        raise UserError(f"{image_set}: {len(missing)} of its images have no xml: {some(missing)}")
    if not files or len(set(files)) < len(files):
        raise UserError(f"{image_set}: names no image, or one twice; the lists of ImageSets/Main are meant")
    return files


def _read(file: Path) -> tuple[ElementTree.Element, list[_Object]]:
    try:
        root = ElementTree.fromstring(file.read_bytes())
    except (ElementTree.ParseError, OSError) as error:
        raise UserError(f"{file}: no valid xml ({error})") from error
    return root, list(_objects(file, root))


def _objects(file: Path, root: ElementTree.Element) -> Iterator[_Object]:
    """Yield the objects; their parts (head, hand, foot), which have boxes too, are none."""
    for number, entry in enumerate(root.findall("object"), start=1):
        name, box = (entry.findtext("name") or "").strip(), entry.find("bndbox")
        try:
            corners = tuple(float(box.findtext(key)) for key in ("xmin", "ymin", "xmax", "ymax"))
            difficult = float(entry.findtext("difficult") or 0) != 0
            finite = all(abs(value) < 1e9 for value in corners)
        except (AttributeError, TypeError, ValueError):
            finite = False
        if not finite or not name:
            raise UserError(f"{file}: object {number} ({name or 'no name'}) lacks a name or a bndbox of four numbers")
        yield _Object(name, corners, difficult)


def _image_file(file: Path, root: ElementTree.Element, images: Path) -> tuple[Path, bool]:
    """Return the image of an xml file, and whether it has the name that stands there: after a renaming it has not."""
    stated = (root.findtext("filename") or "").strip().replace("\\", "/")
    if stated and (images / stated).is_file():
        return images / stated, True
    for suffix in (*IMAGE_SUFFIXES, *map(str.upper, IMAGE_SUFFIXES)):
        if (images / f"{file.stem}{suffix}").is_file():
            return images / f"{file.stem}{suffix}", False
    raise UserError(f"{file}: its image is not in {images}, neither {stated or 'a filename'} nor {file.stem}.*")


def _size(root: ElementTree.Element, path: Path) -> tuple[int, int]:
    """Return the (height, width) that the xml states; that of the file where it states none, or zeros."""
    try:
        size = int(float(root.findtext("size/height"))), int(float(root.findtext("size/width")))
    except (TypeError, ValueError):
        size = (0, 0)
    return size if min(size) > 0 else image_size(path, turned=False)
