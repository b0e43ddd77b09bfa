"""Files of a set: missing, renamed, broken, of another size, turned, twice, in two sets."""

import shutil

import numpy as np
import pytest
from doctor_cases import HEIGHT, NAMES, WIDTH, clean, write_image, write_images, write_json
from PIL import Image

from retinanet.data.coco import CocoDataset
from retinanet.data.doctor import Source, compare, errors, examine, repair, write_repaired


@pytest.fixture
def folder(tmp_path):
    return write_images(tmp_path / "images")


def report_of(folder, content=None, open_files=False, name="x"):
    path = write_json(folder.parent / f"{name}.json", clean() if content is None else content)
    return examine(Source(name, path, folder), open_files, workers=2)


def found_in(report, kind):
    (finding,) = (one for one in report.findings if one.kind == kind)
    return finding


def fixed(report, folder):
    repair(report)
    path = folder.parent / "out.json"
    write_repaired(report, path)
    again = examine(Source("out", path, folder), open_files=True)
    assert not errors(again.findings)
    dataset = CocoDataset(folder, path)
    assert all(dataset.read(i)[0].shape == (*dataset.image_size(i), 3) for i in range(len(dataset)))
    return again.content


def test_readable_files_of_the_stated_size_give_no_finding(folder):
    report = report_of(folder, open_files=True)
    assert report.findings == [] and len({one.digest for one in report.opened.values()}) == 4
    assert all(one.pixels == (HEIGHT, WIDTH) and one.orientation == 1 for one in report.opened.values())


def test_progress_counts_every_image_that_is_opened(folder):
    (folder / "b.png").unlink()
    seen = []
    report = examine(
        Source("x", write_json(folder.parent / "x.json", clean()), folder),
        open_files=True,
        workers=3,
        progress=lambda items, total: (seen.append(total), items)[1],
    )
    assert seen == [3] and sorted(report.opened) == [0, 2, 3]


def test_a_missing_folder_is_an_error(tmp_path):
    report = report_of(tmp_path / "nowhere")
    assert found_in(report, "images-dir").severity == "error" and report.presence is None


def test_missing_files_are_named_and_dropped_by_the_repair(folder):
    (folder / "b.png").unlink()
    report = report_of(folder)
    assert found_in(report, "missing-file").image_ids == (11,)
    content = fixed(report, folder)
    assert [image["id"] for image in content["images"]] == [10, 12, 13]
    assert {record["image_id"] for record in content["annotations"]} == {10, 12, 13}


def test_a_wrong_folder_is_called_that(tmp_path):
    assert "hardly the folder of this json" in found_in(report_of(tmp_path), "missing-file").message


@pytest.mark.parametrize(
    "written", ["C:\\Users\\me\\photos\\a.png", "/home/me/photos/a.png", "A.PNG", "old/a.png", "./old/../A.png"]
)
def test_a_name_of_another_machine_is_corrected_when_one_file_fits(folder, written):
    content = clean()
    content["images"][0]["file_name"] = written
    report = report_of(folder, content)
    finding = found_in(report, "renamed-file")
    assert finding.image_ids == (10,) and "a.png" in finding.examples[0]
    assert "missing-file" not in {one.kind for one in report.findings}
    assert fixed(report, folder) == clean()


def test_a_name_that_two_files_or_two_images_would_fit_is_missing(folder):
    content = clean()
    content["images"][0]["file_name"] = "x/new.png"
    for place in ("one", "two"):
        write_image(folder / place / "new.png", WIDTH, HEIGHT, 8)
    assert found_in(report_of(folder, content), "missing-file").image_ids == (10,)
    shutil.rmtree(folder / "two")
    assert found_in(report_of(folder, content), "renamed-file").image_ids == (10,)
    content["images"][1]["file_name"] = "y/new.png"
    assert found_in(report_of(folder, content), "missing-file").image_ids == (10, 11)


def test_a_file_that_another_image_has_is_no_candidate(folder):
    content = clean()
    content["images"][1]["file_name"] = "old/a.png"
    assert found_in(report_of(folder, content), "missing-file").image_ids == (11,)


def test_paths_with_dots_and_links_are_found(folder):
    content = clean()
    content["images"][0]["file_name"] = "./sub/../a.png"
    (folder / "link.png").symlink_to(folder / "b.png")
    content["images"][1]["file_name"] = "link.png"
    assert report_of(folder, content).findings == []


def test_a_name_too_long_for_a_file_is_missing(folder):
    content = clean()
    content["images"][0]["file_name"] = "a" * 5000
    assert found_in(report_of(folder, content), "missing-file").image_ids == (10,)


def damaged(data: bytes, how: str) -> bytes:
    return {"empty": b"", "text": b"not an image", "cut": data[: len(data) // 2], "head": data[:20]}[how]


@pytest.mark.parametrize(
    "how, kind",
    [("empty", "empty-file"), ("text", "broken-image"), ("cut", "broken-image"), ("head", "broken-image")],
)
def test_files_that_training_cannot_read_are_found_and_dropped(folder, how, kind):
    content = clean()
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(folder / "e.jpg")
    (folder / "e.jpg").write_bytes(damaged((folder / "e.jpg").read_bytes(), how))
    content["images"][0]["file_name"] = "e.jpg"
    assert kind not in {one.kind for one in report_of(folder, content).findings}  # nothing was opened
    report = report_of(folder, content, open_files=True)
    finding = found_in(report, kind)
    assert finding.image_ids == (10,) and str(folder) not in finding.examples[0]
    assert [image["id"] for image in fixed(report, folder)["images"]] == [11, 12, 13]


def test_a_folder_in_place_of_an_image_is_missing(folder):
    (folder / "a.png").unlink()
    (folder / "a.png").mkdir()
    assert found_in(report_of(folder, open_files=True), "missing-file").image_ids == (10,)


def test_another_size_than_stated_is_found_and_dropped(folder):
    write_image(folder / "a.png", WIDTH - 1, HEIGHT, 0)
    report = report_of(folder, open_files=True)
    finding = found_in(report, "size-mismatch")
    assert finding.image_ids == (10,) and "119 x 100" in finding.examples[0] and "120 x 100" in finding.examples[0]
    assert len(fixed(report, folder)["images"]) == 3


@pytest.mark.parametrize(
    "orientation, size, kind",
    [
        (6, (WIDTH, HEIGHT), "exif-turned"),  # boxes drawn on the raw pixels
        (8, (HEIGHT, WIDTH), "exif-turned"),  # boxes drawn on the photo as viewers show it
        (3, (WIDTH, HEIGHT), "exif-unclear"),
        (2, (WIDTH, HEIGHT), "exif-unclear"),
        (6, (60, 60), "exif-unclear"),
    ],
)
def test_exif_notes_are_reported_with_what_the_json_tells_about_them(folder, orientation, size, kind):
    stored = size if kind == "exif-unclear" else (WIDTH, HEIGHT)
    image = Image.fromarray(np.random.default_rng(5).integers(0, 256, (stored[1], stored[0], 3)).astype(np.uint8))
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(folder / "e.jpg", exif=exif)
    content = clean()
    content["images"][0] |= {"file_name": "e.jpg", "width": size[0], "height": size[1]}
    content["annotations"] = content["annotations"][12:]
    report = report_of(folder, content, open_files=True)
    assert found_in(report, kind).image_ids == (10,) and not errors(report.findings)


def test_equal_contents_under_two_names_are_found(folder):
    shutil.copy(folder / "a.png", folder / "b.png")
    finding = found_in(report_of(folder, open_files=True), "duplicate-image")
    assert finding.image_ids == (11,) and "equals a.png" in finding.examples[0]


def part(numbers) -> dict:
    content = clean()
    content["images"] = [image for image in content["images"] if image["id"] in numbers]
    content["annotations"] = [record for record in content["annotations"] if record["image_id"] in numbers]
    return content


def kinds_between(train, test) -> list[str]:
    return [finding.kind for finding in compare([train], [test])]


def test_sets_of_one_folder_without_common_images_share_nothing(folder):
    train, test = (report_of(folder, part(ids), True, f"set{ids}") for ids in ((10, 11), (12, 13)))
    assert kinds_between(train, test) == []


def test_files_that_no_set_names_are_listed_once(folder):
    write_image(folder / "sub" / "e.jpg", 9, 9, 0)
    (folder / "notes.txt").write_text("")
    train, test = (report_of(folder, part(ids), name=f"set{ids}") for ids in ((10, 11), (12, 13)))
    (finding,) = compare([train], [test])
    assert (finding.kind, finding.count, finding.examples) == ("unlisted-file", 1, ("sub/e.jpg",))


def test_an_image_in_both_sets_is_leakage(folder):
    train, test = (report_of(folder, part(ids), name=f"set{ids}") for ids in ((10, 11, 12), (12, 13)))
    (finding,) = compare([train], [test])
    assert finding.kind == "leakage" and finding.image_ids == (12,)


def test_equal_contents_in_two_folders_are_leakage_once_the_files_were_opened(folder, tmp_path):
    other = tmp_path / "other"
    write_image(other / "a.png", 60, 50, 0)
    shutil.copy(folder / "b.png", other / "b.png")
    shutil.copy(folder / "a.png", other / "new.png")
    content = part((10, 11, 12))
    content["images"][2]["file_name"] = "new.png"
    closed, opened = ([report_of(folder, part((10, 11)), o), report_of(other, content, o)] for o in (False, True))
    found = {finding.kind: finding for finding in compare(closed[:1], closed[1:])}
    assert found["possible-leakage"].image_ids == (11,) and "leakage" not in found
    found = {finding.kind: finding for finding in compare(opened[:1], opened[1:])}
    assert found["leakage"].image_ids == (11, 12) and "possible-leakage" not in found


def test_categories_have_to_be_the_same_in_all_sets(folder):
    content = part((12, 13))
    content["categories"].append({"id": 9, "name": "cow"})
    found = compare([report_of(folder, part((10, 11)), name="one")], [report_of(folder, content, name="two")])
    assert [(finding.kind, finding.examples) for finding in found] == [("different-categories", ("(9, 'cow')",))]


def test_every_real_image_is_readable(shared):
    path, images = shared("data/raccoon/annotations/val.json"), shared("data/raccoon/images")
    report = examine(Source("raccoon", path, images), open_files=True)
    assert not errors(report.findings) and len(report.opened) == 56 and NAMES[0] not in report.presence.unlisted
