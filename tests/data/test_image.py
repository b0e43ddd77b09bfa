"""Reading image files: formats, EXIF orientation and broken files; PIL is the independent decoder."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from retinanet.data.image import ImageError, read_image
from retinanet.errors import UserError

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 10, 3)).astype(np.uint8)  # RGB
SMOOTH = cv2.resize(PIXELS, (100, 60))  # survives JPEG
ORIENTATION_TAG = 0x0112


def save(path, image: Image.Image, orientation: int = 0, **options):
    exif = image.getexif()
    if orientation:
        exif[ORIENTATION_TAG] = orientation
    image.save(path, exif=exif, **options)
    return path


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "1"])
def test_every_pixel_mode_becomes_three_channels_of_uint8(tmp_path, mode):
    picture = Image.fromarray(PIXELS).convert(mode)
    image = read_image(save(tmp_path / "a.png", picture), (6, 10))
    assert image.shape == (6, 10, 3) and image.dtype == np.uint8
    expected = np.asarray(Image.fromarray(np.asarray(picture.convert("RGBA"))[..., :3]))
    np.testing.assert_array_equal(image[..., ::-1], expected)


def test_16_bit_image_keeps_its_upper_byte(tmp_path):
    values = np.arange(60, dtype=np.uint16).reshape(6, 10) * 1000
    assert cv2.imwrite(str(tmp_path / "a.png"), values)
    image = read_image(tmp_path / "a.png", (6, 10))
    assert image.dtype == np.uint8 and image.shape == (6, 10, 3)
    assert np.abs(image[..., 0].astype(float) - values / 257.0).max() <= 1


def test_cmyk_jpeg_is_read(tmp_path):
    path = save(tmp_path / "a.jpg", Image.fromarray(SMOOTH).convert("CMYK"), quality=100)
    assert read_image(path, (60, 100)).shape == (60, 100, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_without_a_stated_size_every_exif_orientation_is_applied(tmp_path, orientation):
    path = save(tmp_path / "a.jpg", Image.fromarray(SMOOTH), orientation, quality=95)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(path)))[..., ::-1].astype(int)
    image = read_image(path)
    assert image.shape == expected.shape
    assert np.abs(image - expected).max() <= 4  # two JPEG decoders


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_stated_size_tells_whether_the_orientation_is_applied(tmp_path, orientation):
    path = save(tmp_path / "a.jpg", Image.fromarray(SMOOTH), orientation, quality=95)
    raw = np.asarray(Image.open(path))[..., ::-1].astype(int)
    turned = np.asarray(ImageOps.exif_transpose(Image.open(path)))[..., ::-1].astype(int)
    assert np.abs(read_image(path, (60, 100)) - raw).max() <= 4
    assert np.abs(read_image(path, (100, 60)) - turned).max() <= 4


def test_half_turn_keeps_the_raw_pixels_of_the_stated_size(tmp_path):
    path = save(tmp_path / "a.jpg", Image.fromarray(SMOOTH), 3, quality=95)
    raw = np.asarray(Image.open(path))[..., ::-1].astype(int)
    assert np.abs(read_image(path, (60, 100)) - raw).max() <= 4


def test_wrong_stated_size_names_file_and_both_sizes(tmp_path):
    path = save(tmp_path / "a.jpg", Image.fromarray(SMOOTH))
    with pytest.raises(UserError, match=r"a\.jpg: the file has 100 x 60 .* state 101 x 60") as caught:
        read_image(path, (60, 101))
    assert not isinstance(caught.value, ImageError)  # wrong for every image of the set: never to be replaced


def _jpeg(**options) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(SMOOTH).save(stream, "JPEG", quality=95, **options)
    return stream.getvalue()


def _jpeg_with_thumbnail() -> bytes:
    """A JPEG whose EXIF block holds a whole little JPEG, end marker included."""
    thumbnail = _jpeg()
    block = b"Exif\x00\x00" + thumbnail
    content = _jpeg()
    return content[:2] + b"\xff\xe1" + (len(block) + 2).to_bytes(2, "big") + block + content[2:]


@pytest.mark.parametrize("make", [_jpeg, lambda: _jpeg(progressive=True), _jpeg_with_thumbnail])
def test_cut_off_jpeg_is_an_error_and_the_whole_one_is_not(tmp_path, make):
    content = make()
    path = tmp_path / "cut.jpg"
    path.write_bytes(content)
    assert read_image(path).shape == (60, 100, 3)
    path.write_bytes(content + b"\x00 trailing bytes of a camera")
    assert read_image(path).shape == (60, 100, 3)
    for missing in (2, 100, 500):
        path.write_bytes(content[:-missing])
        with pytest.raises(ImageError, match=r"cut\.jpg: the JPEG file is cut off after \d+ bytes$"):
            read_image(path)
        with pytest.raises(ImageError, match=r"cut\.jpg: the JPEG .*MAX_BAD_IMAGES"):  # of a data set
            read_image(path, (60, 100))


@pytest.mark.parametrize(
    "content, reason", [(b"", "empty"), (b"not an image", "not an image"), (b"\x89PNG\r\n\x1a\n1234", "image")]
)
def test_broken_files_are_image_errors_that_name_the_path(tmp_path, content, reason):
    path = tmp_path / "broken.png"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=rf"broken\.png: .*{reason}"):
        read_image(path)


def test_missing_file_and_folder_are_image_errors(tmp_path):
    with pytest.raises(ImageError, match=r"nothing\.jpg: the image file does not exist"):
        read_image(tmp_path / "nothing.jpg")
    with pytest.raises(ImageError, match="cannot be opened"):
        read_image(tmp_path)


def test_image_of_one_pixel_is_read(tmp_path):
    path = save(tmp_path / "a.png", Image.fromarray(np.array([[[1, 2, 3]]], np.uint8)))
    assert read_image(path, (1, 1)).tolist() == [[[3, 2, 1]]]
