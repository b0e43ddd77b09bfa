"""Words of a command line become images and videos, and those become frames in batches."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from retinanet.data.inputs import Frame, Source, find_sources, in_batches, listed, read_frames
from retinanet.data.video import VideoWriter
from retinanet.errors import UserError


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """photos/b.png, photos/a.JPG, photos/notes.txt, photos/more/a.png; the working directory is beside them."""
    rng = np.random.default_rng(0)
    (tmp_path / "photos/more").mkdir(parents=True)
    for name in ("photos/b.png", "photos/a.JPG", "photos/more/a.png"):
        image = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)
        (tmp_path / name).write_bytes(cv2.imencode(Path(name).suffix, image)[1].tobytes())
    (tmp_path / "photos/notes.txt").write_text("no picture")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "photos"


def write_video(path: Path, count: int) -> None:
    with VideoWriter(path, 10) as writer:
        for number in range(count):
            writer.write(np.full((48, 64, 3), 10 * number, np.uint8))


def pairs(words, recursive=False) -> list[tuple[str, str]]:
    return [(str(source.path), str(source.name)) for source in find_sources(words, recursive)]


def test_folder_gives_its_pictures_and_videos_by_name(photos):
    assert pairs(["photos"]) == [("photos/a.JPG", "a.JPG"), ("photos/b.png", "b.png")]
    write_video(photos / "aa.avi", 1)
    assert pairs(["photos"]) == [("photos/a.JPG", "a.JPG"), ("photos/aa.avi", "aa.mp4"), ("photos/b.png", "b.png")]
    assert [source.is_video for source in find_sources(["photos"], False)] == [False, True, False]


def test_recursive_keeps_the_folders_inside(photos):
    found = pairs(["photos"], True)
    assert found[-1] == ("photos/more/a.png", "more/a.png") and len(found) == 3


def test_patterns_files_and_repeated_names(photos):
    found = pairs(["photos/*/a.png", "photos/b.png", "photos", "photos/more"])
    assert found == [("photos/more/a.png", "a.png"), ("photos/b.png", "b.png"), ("photos/a.JPG", "a.JPG")]
    (photos / "a.png").write_bytes((photos / "b.png").read_bytes())
    found = pairs(["photos/a.png", "photos/more/a.png"])
    assert found == [("photos/a.png", "a.png"), ("photos/more/a.png", "a_2.png")]


def test_a_name_with_brackets_is_a_file_and_not_a_pattern(photos):
    (photos / "b[1].png").write_bytes((photos / "b.png").read_bytes())
    assert pairs(["photos/b[1].png"]) == [("photos/b[1].png", "b[1].png")]


def test_unwritable_formats_become_png(photos):
    (photos / "c.jp2").write_bytes(b"")
    assert pairs(["photos/c.jp2"]) == [("photos/c.jp2", "c.png")]


def test_a_list_stands_where_the_dash_was():
    assert listed(["a", "-", "b"], ["c d.jpg\n", "\n", " e\r\n"]) == ["a", "c d.jpg", " e", "b"]
    with pytest.raises(UserError, match="standard input names no file"):
        listed(["-"], ["\n"])


def test_frames_come_in_order_with_ids_that_count_through(photos):
    write_video(photos / "clip.mp4", 3)
    (photos / "c.png").write_bytes(b"broken")
    (photos / "clip2.mp4").write_bytes(b"broken")
    frames = list(read_frames(find_sources(["photos"], False)))
    assert [(frame.source, frame.number) for frame in frames] == [
        (0, None), (1, None), (2, None), (3, 0), (3, 1), (3, 2), (4, None)
    ]  # fmt: skip
    assert [frame.image_id for frame in frames][:6] == [1, 2, 3, 4, 5, 6]
    assert "c.png" in str(frames[2].image) and "clip2.mp4: not a video" in str(frames[6].image)
    assert [frame.image[20, 20, 0] // 10 for frame in frames[3:6]] == pytest.approx([0, 1, 2], abs=1)
    assert len(list(read_frames(find_sources(["photos/clip.mp4"], False), limit=2))) == 2


def test_batches_hold_frames_of_one_video_or_pictures():
    pixel, broken = np.zeros((1, 1, 3), np.uint8), UserError("broken")
    kinds = [(0, None, pixel), (1, None, broken), (2, None, pixel), (3, 0, pixel), (3, 1, pixel), (4, 0, pixel)]
    frames = [Frame(source, number, 1, image) for source, number, image in kinds]
    batches = [[(frame.source, frame.number) for frame in batch] for batch in in_batches(iter(frames), 4)]
    assert batches == [[(1, None)], [(0, None), (2, None)], [(3, 0), (3, 1)], [(4, 0)]]
    assert [len(batch) for batch in in_batches([frames[0]] * 5, 2)] == [2, 2, 1]


def test_a_camera_is_a_video():
    assert Source(0, Path("camera_0.mp4")).is_video
