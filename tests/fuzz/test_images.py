"""Image files by machine: every format, mode, orientation and damage. PIL, another decoder, says what is right."""

import io
import json
import resource
import struct
import zlib

import cv2
import numpy as np
import pytest
from fuzz_profile import count, tried, within
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from retinanet.data.coco import CocoDataset
from retinanet.data.doctor import Source, errors, examine
from retinanet.data.image import ImageError, jpeg_size, read_image
from retinanet.errors import UserError

ORIENTATION_TAG = 0x0112
# name -> (format of PIL, mode, options of save)
FORMATS = {
    "png": ("PNG", "RGB", {}),
    "png grey": ("PNG", "L", {}),
    "png 1 bit": ("PNG", "1", {}),
    "png palette": ("PNG", "P", {}),
    "png palette with a clear colour": ("PNG", "P", {"transparency": 3}),
    "png alpha": ("PNG", "RGBA", {}),
    "png grey alpha": ("PNG", "LA", {}),
    "png 16 bit": ("PNG", "I;16", {}),
    "png animated": ("PNG", "RGB", {"save_all": True}),
    "jpeg": ("JPEG", "RGB", {"quality": 90}),
    "jpeg grey": ("JPEG", "L", {}),
    "jpeg cmyk": ("JPEG", "CMYK", {}),
    "jpeg progressive": ("JPEG", "RGB", {"progressive": True}),
    "bmp": ("BMP", "RGB", {}),
    "bmp palette": ("BMP", "P", {}),
    "webp": ("WEBP", "RGB", {}),
    "webp alpha, lossless": ("WEBP", "RGBA", {"lossless": True}),
    "webp animated": ("WEBP", "RGB", {"save_all": True}),
    "tiff": ("TIFF", "RGB", {}),
    "tiff 16 bit": ("TIFF", "I;16", {}),
    "tiff cmyk": ("TIFF", "CMYK", {}),
    "tiff lzw": ("TIFF", "RGB", {"compression": "tiff_lzw"}),
    "tiff deflate": ("TIFF", "L", {"compression": "tiff_adobe_deflate"}),
    "tiff fax": ("TIFF", "1", {"compression": "group4"}),
    "ppm": ("PPM", "RGB", {}),
    "pbm": ("PPM", "1", {}),
    "jpeg 2000": ("JPEG2000", "RGB", {}),
}
SIZES = st.tuples(st.integers(1, 40), st.integers(1, 40))


def encode(name: str, size: tuple[int, int], seed: int, orientation: int = 0) -> bytes:
    """Return the bytes of a picture of `size` (height, width) in one of `FORMATS`."""
    format_, mode, options = FORMATS[name]
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 4, 3)).astype(np.uint8)
    pixels = cv2.resize(coarse, size[::-1])
    picture = Image.fromarray(pixels)
    if mode == "I;16":
        picture = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    elif mode != "RGB":
        picture = picture.convert(mode)
    if "save_all" in options:
        options = options | {"append_images": [picture.rotate(180)]}
    if orientation:
        exif = picture.getexif()
        exif[ORIENTATION_TAG] = orientation
        options = options | {"exif": exif}
    stream = io.BytesIO()
    picture.save(stream, format_, **options)
    return stream.getvalue()


def oracle(data: bytes) -> np.ndarray:
    """Return (H, W, 3) int BGR as PIL has it: the first frame, without alpha, the upper byte of 16 bits."""
    picture = Image.open(io.BytesIO(data))
    if picture.mode.startswith("I"):
        return np.repeat((np.asarray(picture).astype(int) >> 8)[..., None], 3, axis=2)
    if picture.mode in ("RGBA", "LA", "P"):
        picture = picture.convert("RGBA")  # `convert("RGB")` of a palette would do; alpha is cut off below
    return np.asarray(picture.convert("RGB") if picture.mode != "RGBA" else picture)[..., 2::-1].astype(int)


def assert_equal(image: np.ndarray, expected: np.ndarray) -> None:
    """Two decoders of a lossy format may differ by some steps of 255."""
    assert image.dtype == np.uint8 and image.shape == expected.shape
    assert np.abs(image - expected).max() <= 4


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("images") / "x.jpg"  # the wrong suffix for nearly all of them


@tried(80)
@given(name=st.sampled_from(sorted(FORMATS)), size=SIZES, seed=st.integers(0, 99))
def test_whole_files_are_what_another_decoder_reads(path, name, size, seed):
    data = encode(name, size, seed)
    path.write_bytes(data)
    assert_equal(read_image(path), oracle(data))
    assert_equal(read_image(path, size), oracle(data))
    count("image, whole", "right")


@tried(60)
@given(size=SIZES, orientation=st.integers(1, 8), stated=SIZES | st.booleans(), seed=st.integers(0, 9))
def test_orientation_follows_the_size_that_the_annotations_state(path, size, orientation, stated, seed):
    data = encode("jpeg", size, seed, orientation)
    path.write_bytes(data)
    raw = oracle(data)
    turned = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))[..., ::-1].astype(int)
    assert_equal(read_image(path), turned)
    stated = raw.shape[:2] if stated is True else turned.shape[:2] if stated is False else stated
    if stated == raw.shape[:2]:
        assert_equal(read_image(path, stated), raw)
    elif stated == turned.shape[:2]:
        assert_equal(read_image(path, stated), turned)
    else:
        with pytest.raises(UserError, match=r"the annotations state"):
            read_image(path, stated)
    count("image, orientation", "right")


@tried(80)
@given(name=st.sampled_from(sorted(FORMATS)), size=SIZES, share=st.floats(0, 1, exclude_max=True))
def test_cut_off_files_are_refused_unless_nothing_is_missing(path, name, size, share):
    data = encode(name, size, 0)
    path.write_bytes(data[: int(share * len(data))])
    try:
        image = read_image(path)
    except ImageError as error:
        assert str(path) in str(error)
        count("image, cut off", "refused")
    else:
        assert_equal(image, oracle(data))  # what was cut off was the second frame, or nothing that counts
        count("image, cut off", "right")


DAMAGED = st.tuples(
    st.sampled_from(sorted(FORMATS)),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=4),
    st.binary(max_size=20),
    st.floats(0, 1),
)


def damage(recipe) -> bytes:
    """Return a file with bytes replaced, and others inserted."""
    name, edits, inserted, place = recipe
    data = bytearray(encode(name, (20, 30), 0))
    for share, value in edits:
        data[int(share * len(data))] = value
    place = int(place * len(data))
    return bytes(data[:place] + inserted + data[place:])


@tried(80)
@given(data=DAMAGED.map(damage) | st.binary(max_size=80))
def test_training_the_doctor_and_prediction_agree_about_damaged_files(path, data):
    """Formats without checksums cannot tell damage from a picture: then the stated size at least is certain."""
    path.write_bytes(data)
    content = {
        "images": [{"id": 1, "file_name": path.name, "width": 30, "height": 20}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9]}],
        "categories": [{"id": 1, "name": "a"}],
    }
    json_path = path.with_suffix(".json")
    json_path.write_text(json.dumps(content))
    found = errors(examine(Source("x", json_path, path.parent), open_files=True, workers=1).findings)
    try:
        image, _ = CocoDataset(path.parent, json_path).read(0)
    except UserError as error:
        assert found and str(path) in str(error)
        count("image, damaged", "refused")
    else:
        assert not found and image.shape == (20, 30, 3) and image.dtype == np.uint8
        count("image, damaged", "right")
    try:
        assert read_image(path).dtype == np.uint8
    except ImageError as error:
        assert str(path) in str(error)


def png_header(width: int, height: int) -> bytes:
    """Return a PNG that claims a size and holds a few bytes of it."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


def jpeg_header(width: int, height: int, **options) -> bytes:
    """Return a JPEG of 30 x 20 pixels whose header claims another size."""
    stream = io.BytesIO()
    Image.new("RGB", (30, 20)).save(stream, "JPEG", **options)
    data = bytearray(stream.getvalue())
    frame = data.find(b"\xff\xc2" if options else b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


BOMBS = {
    "png": png_header(30_000, 30_000),
    "png beyond all limits": png_header(2**31 - 1, 2**31 - 1),
    "jpeg": jpeg_header(30_000, 30_000),
    "jpeg progressive": jpeg_header(30_000, 30_000, progressive=True),
    "jpeg beyond all limits": jpeg_header(65_000, 65_000),
    "bmp": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 30_000, 30_000, 1, 24, 0, 0, 0, 0, 0, 0),
    "ppm": b"P6\n30000 30000\n255\nabc",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_huge_header_over_little_data_is_refused_at_once_and_costs_no_memory(path, name):
    path.write_bytes(BOMBS[name])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with within(2), pytest.raises(ImageError, match="x.jpg: "):
        read_image(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 200 * 1024  # KiB
    count("image, huge header", "refused")


def test_a_flat_jpeg_holds_more_than_the_least_that_is_asked_of_one(path):
    """The check that refuses the bombs must let the smallest honest files through."""
    for mode, options in (("L", {}), ("RGB", {}), ("L", {"progressive": True}), ("RGB", {"optimize": True})):
        stream = io.BytesIO()
        Image.new(mode, (2048, 1536)).save(stream, "JPEG", quality=1, **options)
        data = np.frombuffer(stream.getvalue(), np.uint8)
        assert jpeg_size(data) == (1536, 2048)
        path.write_bytes(stream.getvalue())
        assert read_image(path).shape == (1536, 2048, 3)
