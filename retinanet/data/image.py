"""Image files -> arrays. EXIF policy: the pixels in the orientation that the annotations were made in.

A camera stores a turned photo as raw pixels plus an EXIF note. Some annotation tools show the raw pixels, others the
turned ones, and the width and height in the json tell which. With no json at hand (prediction) the note is applied,
as every viewer does. A note that keeps the size (half turns, mirrors, square photos) cannot be told from the json:
the raw pixels are used.
"""

from pathlib import Path

import cv2
import numpy as np

from retinanet.errors import UserError

_RAW = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
_REMEDY = (
    "restore the file, take the image out of the json (tools/check_dataset.py --fix), "
    "or let training replace a few such files (DATALOADER.MAX_BAD_IMAGES)"
)
_JPEG, _JPEG_SCAN, _JPEG_END = b"\xff\xd8", b"\xff\xda", b"\xff\xd9"
# Huffman codes spend at least one bit on each block of 8 x 8. A file with less would be blown up to gigabytes of grey.
_MOST_PIXELS_PER_BYTE = 64 * 8
_LONGEST_HEADER = 2**20  # bytes in which the frame header is looked for: colour profiles and thumbnails precede it
_HUFFMAN_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended and progressive


class ImageError(UserError):
    """An image file that cannot be read; the message names its path. Training may replace a few of these."""


def read_image(path: str | Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """Return the image as (H, W, 3) uint8 BGR; grey, palette, alpha and 16-bit files are converted to that.

    `size` is the (height, width) that the annotations state and decides about the EXIF orientation; None applies it.
    Raises `ImageError` for a missing, empty, truncated or undecodable file, and `UserError` when neither orientation
    of the file has the stated size.
    """
    if size is None:
        return _decode(path, _read_bytes(path), cv2.IMREAD_COLOR)
    try:
        data = _read_bytes(path)
        image = _decode(path, data, _RAW)
        if image.shape[:2] == tuple(size):
            return image
        turned = _decode(path, data, cv2.IMREAD_COLOR)
    except ImageError as error:  # an image of a data set: then there is more to say
        raise ImageError(f"{error}; {_REMEDY}") from None
    if turned.shape[:2] == tuple(size):
        return turned
    raise UserError(
        f"{path}: the file has {image.shape[1]} x {image.shape[0]} pixels (width x height) and the annotations state "
        f"{size[1]} x {size[0]}, so its boxes cannot be placed; correct width and height in the json or put the "
        "right file there (tools/check_dataset.py lists all such images)"
    )


def _read_bytes(path: str | Path) -> bytes:
    try:
        with open(path, "rb", buffering=0) as file:
            data = file.read()
    except FileNotFoundError:
        raise ImageError(f"{path}: the image file does not exist") from None
    except OSError as error:
        raise ImageError(f"{path}: the image file cannot be opened ({error.strerror})") from None
    if not data:
        raise ImageError(f"{path}: the image file is empty (0 bytes)")
    return data


def _decode(path: str | Path, data: bytes, flags: int) -> np.ndarray:
    if _is_truncated_jpeg(data):
        raise ImageError(f"{path}: the JPEG file is cut off after {len(data)} bytes")
    height, width = jpeg_size(data)
    if height * width > _MOST_PIXELS_PER_BYTE * len(data):
        raise ImageError(f"{path}: the JPEG file claims {width} x {height} pixels and has {len(data)} bytes, too few")
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        raise ImageError(f"{path}: the image cannot be decoded ({error.err})") from None
    if image is None:
        raise ImageError(f"{path}: not an image that OpenCV can decode, or a damaged one")
    return image


def _is_truncated_jpeg(data: bytes) -> bool:
    """Whether a JPEG has no end marker after its last scan; decoders fill what is missing with grey and say nothing.

    Inside a scan the byte 0xff is followed by 0x00 or a restart marker, so the last two markers found are real ones.
    """
    # looking for a scan behind the last end marker, mostly in two bytes, is 0.1 ms faster than for the last scan
    return data.startswith(_JPEG) and data.find(_JPEG_SCAN, max(data.rfind(_JPEG_END), 0)) >= 0


def jpeg_size(data: bytes | np.ndarray) -> tuple[int, int]:
    """Return (height, width) as the header of a Huffman-coded JPEG states them, (0, 0) for anything else.

    Goes from marker segment to marker segment, some microseconds; `data`: the bytes, or (B,) uint8.
    """
    head = memoryview(data)[:_LONGEST_HEADER]
    place = 2 if head[:2] == _JPEG else len(head)
    while place + 9 <= len(head) and head[place] == 0xFF:
        marker = head[place + 1]
        if marker in _HUFFMAN_FRAMES:
            return int.from_bytes(head[place + 5 : place + 7], "big"), int.from_bytes(
                head[place + 7 : place + 9], "big"
            )
        place += 1 if marker == 0xFF else 2 + int.from_bytes(head[place + 2 : place + 4], "big")  # 0xff may fill
    return 0, 0
