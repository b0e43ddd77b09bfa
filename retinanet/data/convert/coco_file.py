"""What the converters share: a COCO json in the making, class names, image sizes, and messages about many culprits."""

from collections.abc import Sequence
from pathlib import Path

import yaml
from PIL import Image, ImageOps

from retinanet.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
_SHOWN = 5


class CocoFile:
    """Images and boxes, numbered from 1 in the order in which they are added. names: the K classes, ids from 1.

    notes: what the user should know about the conversion, a line each.
    """

    def __init__(self, names: Sequence[str], source: str):
        self.notes: list[str] = []
        self.ids = {name: number for number, name in enumerate(names, start=1)}
        self.content = {
            "info": {"description": f"converted from {source}"},
            "categories": [{"id": number, "name": name} for name, number in self.ids.items()],
            "images": [],
            "annotations": [],
        }

    def add_image(self, file_name: str, size: tuple[int, int]) -> None:
        """Begin an image; size: (height, width)."""
        number = len(self.content["images"]) + 1
        entry = {"id": number, "file_name": file_name, "width": size[1], "height": size[0]}
        self.content["images"].append(entry)

    def add_box(self, name: str, xywh: Sequence[float], is_crowd: bool = False) -> None:
        """Add a box to the last image; xywh: pixels, x and y from 0, continuous."""
        x, y, width, height = (_number(value) for value in xywh)
        self.content["annotations"].append(
            {
                "id": len(self.content["annotations"]) + 1,
                "image_id": len(self.content["images"]),
                "category_id": self.ids[name],
                "bbox": [x, y, width, height],
                "area": _number(width * height),
                "iscrowd": int(is_crowd),
            }
        )


def _number(value: float) -> float | int:
    """Return whole numbers as int, so that 12.0 does not become another text in the json than in the source."""
    return int(value) if float(value).is_integer() else round(float(value), 6)


def read_names(path: str | Path) -> list[str]:
    """Return the class names of a text file, one a line, or of the `names` of a YAML file: a list, or numbers to names.

    Raises `UserError` for a file without names, names given twice and numbers with gaps.
    """
    path = Path(path)
    text = read_text(path)
    if path.suffix.lower() not in (".yaml", ".yml"):
        return check_names([line.strip() for line in text.splitlines() if line.strip()], path)
    try:
        names = yaml.safe_load(text)["names"]
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise UserError(f"{path}: no YAML with the key `names` ({type(error).__name__})") from error
    if isinstance(names, dict):
        if sorted(names) != list(range(len(names))):
            raise UserError(f"{path}: names are numbered {sorted(map(str, names))}; they have to count from 0")
        names = [names[number] for number in range(len(names))]
    return check_names([str(name).strip() for name in names or []], path)


def check_names(names: list[str], source: str | Path) -> list[str]:
    """Return `names`; `UserError` when there are none, an empty one or equal ones."""
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not names or "" in names:
        raise UserError(f"{source}: {'equal names ' + ', '.join(twice) if twice else 'an empty or no class name'}")
    return names


def read_text(path: Path) -> str:
    """Return the content of a UTF-8 file, with or without its mark; `UserError` when there is none."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text ({getattr(error, 'strerror', None) or error})") from error


def image_size(path: Path, turned: bool) -> tuple[int, int]:
    """Return (height, width) from the head of an image file; turned: as a viewer shows it, by its EXIF note."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            if turned and image.getexif().get(0x0112, 1) >= 5:
                width, height = ImageOps.exif_transpose(image).size
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not an image that can be opened ({error})") from error
    return height, width


def list_images(folder: Path) -> list[Path]:
    """Return the image files of a folder and those inside, by name; `UserError` when there is none."""
    if not folder.is_dir():
        raise UserError(f"{folder}: the image folder does not exist")
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise UserError(f"{folder}: no image files ({' '.join(IMAGE_SUFFIXES)})")
    return files


def some(culprits: Sequence) -> str:
    """Return the first of many things for a message, and how many there are beyond."""
    more = len(culprits) - _SHOWN
    return "; ".join(map(str, culprits[:_SHOWN])) + (f"; and {more} more" if more > 0 else "")
