"""The files of a set: which are there, by listing folders, and what is in them, by reading each as training does."""

import hashlib
import io
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from retinanet.data.doctor.culprits import on_images
from retinanet.data.doctor.findings import Finding
from retinanet.data.doctor.ids import is_size
from retinanet.data.doctor.table import Table
from retinanet.data.image import ImageError, read_image
from retinanet.data.json_values import is_file_name
from retinanet.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".png", ".bmp", ".dib", ".webp", ".tif", ".tiff", ".jp2", ".ppm", ".pgm", ".pbm")
_MOST_WALKED = 300_000  # files looked at for a missing one: a wrong folder may be a whole disk
_IN_FLIGHT = 256  # images read ahead of the progress report
_ORIENTATION = 0x0112  # EXIF tag
TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height

Progress = Callable[[Iterable, int], Iterable]  # (items, how many) -> the same items


@dataclass(frozen=True)
class Presence:
    """Which files of a table are there.

    missing: rows of images without a file. renamed: row -> the name under which a missing file is surely found.
    unlisted: image files in the folders of the set that the json does not name.
    """

    missing: tuple[int, ...] = ()
    renamed: dict[int, str] = field(default_factory=dict)
    unlisted: tuple[str, ...] = ()


@dataclass(frozen=True)
class Opened:
    """What reading one file told. problem: the kind of finding, empty when training can read it; detail: why.

    orientation: the EXIF orientation, 1 when there is none. digest: of the bytes. pixels: raw (height, width), (0, 0)
    when unknown.
    """

    problem: str
    detail: str
    orientation: int
    digest: str
    pixels: tuple[int, int]


def look(table: Table, images_dir: Path) -> Presence:
    """Return which images of the table have a file below `images_dir`; lists folders, opens nothing."""
    names = [name if is_file_name(name) else None for name in table.column("images", "file_name")]
    listed = _list_folders(images_dir, {os.path.dirname(name) for name in names if name is not None} | {""})
    missing = [
        row
        for row, name in enumerate(names)
        if name is not None and name not in listed and not _is_file(images_dir, name)
    ]
    known = {os.path.normpath(name) for name in names if name is not None}
    unlisted = sorted(name for name in listed - known if os.path.splitext(name)[1].lower() in SUFFIXES)
    renamed = _find_renamed(images_dir, {row: names[row] for row in missing}, known) if missing else {}
    return Presence(tuple(row for row in missing if row not in renamed), renamed, tuple(unlisted))


def _list_folders(images_dir: Path, folders: set[str]) -> set[str]:
    """Return the files that lie directly in these folders below `images_dir`, named as the json would."""
    found = set()
    for folder in folders:
        try:
            with os.scandir(images_dir / folder) as entries:
                found.update(os.path.join(folder, entry.name) for entry in entries if not entry.is_dir())
        except (OSError, ValueError):  # no such folder, or a name that no folder can have
            continue
    return found


def _is_file(images_dir: Path, name: str) -> bool:
    try:
        return (images_dir / name).is_file()
    except (OSError, ValueError):  # too long for a name
        return False


def _find_renamed(images_dir: Path, missing: dict[int, str], known: set[str]) -> dict[int, str]:
    """Return row -> new name for missing files of which exactly one with that last part and no entry is there.

    It is what remains when the json was made on another machine: absolute paths, backslashes, another folder, another
    case of letters.
    """
    candidates = defaultdict(list)
    for name in _walk(images_dir):
        if name not in known:
            candidates[os.path.basename(name).casefold()].append(name)
    found = {}
    for row, name in missing.items():
        matches = candidates.get(name.replace("\\", "/").rsplit("/", 1)[-1].casefold(), [])
        if len(matches) == 1:
            found[row] = matches[0]
    taken = defaultdict(int)
    for name in found.values():
        taken[name] += 1
    return {row: name for row, name in found.items() if taken[name] == 1}


def _walk(images_dir: Path) -> Iterator[str]:
    count = 0
    for folder, _, files in os.walk(images_dir):
        for file in files:
            count += 1
            if count > _MOST_WALKED:
                return
            if is_file_name(file):
                yield os.path.relpath(os.path.join(folder, file), images_dir)


def check_presence(table: Table, images_dir: Path, presence: Presence) -> Iterator[Finding]:
    """Yield images whose file is missing or has another name; files that no json names are for `compare` to tell."""
    missing, renamed = set(presence.missing), presence.renamed
    rows = range(len(table.images))
    message = f"images have no file in {images_dir}"
    if table.images and len(missing) == len(table.images):
        message += ": none has one, so this is hardly the folder of this json"
    yield from on_images(table, "missing-file", [row in missing for row in rows], message, lambda row: "")
    message = f"images have no file of that name in {images_dir}, but another entry of that name is there"
    yield from on_images(
        table, "renamed-file", [row in renamed for row in rows], message, lambda row: f"may be {renamed[row]}"
    )


def open_images(
    table: Table, images_dir: Path, presence: Presence, workers: int, progress: Progress
) -> dict[int, Opened]:
    """Return row -> what reading the file told, for every image whose file is there.

    workers: threads; reading and decoding leave Python's lock alone. progress: wraps what is counted.
    """
    gone = {*presence.missing, *presence.renamed}
    names = table.column("images", "file_name")
    rows = [row for row, name in enumerate(names) if is_file_name(name) and row not in gone]
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        return dict(progress(_in_order(pool, table, images_dir, rows), len(rows)))


def _in_order(pool: ThreadPoolExecutor, table: Table, images_dir: Path, rows: list[int]):
    for start in range(0, len(rows), _IN_FLIGHT):
        chunk = rows[start : start + _IN_FLIGHT]
        yield from zip(chunk, pool.map(lambda row: _open(table.images[row], images_dir), chunk), strict=True)


def _open(image: dict, images_dir: Path) -> Opened:
    path = images_dir / image["file_name"]
    try:
        data = path.read_bytes()
    except OSError as error:
        return Opened("broken-image", f"cannot be opened ({error.strerror})", 1, "", (0, 0))
    if not data:
        return Opened("empty-file", "has 0 bytes", 1, "", (0, 0))
    digest = hashlib.blake2b(data, digest_size=16).hexdigest()
    orientation, pixels = read_header(data)
    size = (image["height"], image["width"]) if is_size(image) else None
    problem, detail = _try_to_read(path, size)
    return Opened(problem, detail, orientation, digest, pixels)


def _try_to_read(path: Path, size: tuple[int, int] | None) -> tuple[str, str]:
    try:
        read_image(path, size)
    except ImageError as error:
        return "broken-image", _reason(error, path)
    except UserError as error:
        return "size-mismatch", _reason(error, path)
    except MemoryError:
        return "broken-image", "does not fit into memory"
    return "", ""


def _reason(error: UserError, path: Path) -> str:
    """Return the first clause of a message, without the path before and the remedy after it."""
    return str(error).removeprefix(f"{path}: ").split("; ")[0].split(", so its boxes")[0]


def read_header(data: bytes | Path) -> tuple[int, tuple[int, int]]:
    """Return the EXIF orientation (1 when there is none) and the raw (height, width), (0, 0) when PIL cannot tell."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as image:
            size = (image.height, image.width)
            orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # noqa: BLE001 - PIL raises anything on damaged files; whether training can read it is tested apart
        return 1, (0, 0)
    return (orientation if orientation in range(1, 9) else 1), size


def check_opened(table: Table, opened: dict[int, Opened]) -> Iterator[Finding]:
    """Yield what reading the files told: broken ones, other sizes than stated, EXIF notes, equal contents."""
    for kind, message in (
        ("empty-file", "image files are empty"),
        ("broken-image", "image files cannot be read"),
        ("size-mismatch", "image files have another size than the json states"),
    ):
        mask = [row in opened and opened[row].problem == kind for row in range(len(table.images))]
        yield from on_images(table, kind, mask, message, lambda row: opened[row].detail)
    yield from _check_orientation(table, opened)
    digests = [opened[row].digest if row in opened else None for row in range(len(table.images))]
    names = table.column("images", "file_name")
    first = {}
    for row, digest in enumerate(digests):
        if digest:
            first.setdefault(digest, row)
    copies = [bool(digest) and names[first[digest]] != names[row] for row, digest in enumerate(digests)]
    message = "images have the same content as an image before them"
    yield from on_images(table, "duplicate-image", copies, message, lambda row: f"equals {names[first[digests[row]]]}")


def _check_orientation(table: Table, opened: dict[int, Opened]) -> Iterator[Finding]:
    noted = {row: one for row, one in opened.items() if not one.problem and one.orientation != 1}
    rows = range(len(table.images))

    def tells(row: int) -> bool:
        one = noted[row]
        return one.orientation in TURNED and one.pixels[0] != one.pixels[1]

    def show(row: int) -> str:
        return f"has EXIF orientation {noted[row].orientation}"

    message = "images carry an EXIF note to turn them; width and height in the json tell whether the boxes are turned"
    yield from on_images(table, "exif-turned", [row in noted and tells(row) for row in rows], message, show)
    message = (
        "images carry an EXIF note that keeps their size, so the json cannot tell which way the boxes were drawn; "
        "training takes the pixels as stored, look at one with its boxes"
    )
    yield from on_images(table, "exif-unclear", [row in noted and not tells(row) for row in rows], message, show)
