"""Class rows and anchors of a file are brought into the order of the model, by name where names are known."""


import torch
from weights.cases import (
    R18,
    assert_complete,
    checkpoint,
    make_cfg,
    make_model,
    write,
)

from retinanet.weights.compare import Inputs
from retinanet.weights.load import build_weights, load_weights
from retinanet.weights.source import AnchorOrder


def test_other_classes_start_from_the_prior(tmp_path):
    file = write(tmp_path / "w.pth", make_model(*R18).state_dict())
    model = make_model(*R18, "MODEL.NUM_CLASSES", 5)
    report = load_weights(model, file, prior_prob=0.05)
    assert report.reinitialised == ["head.cls_pred.weight", "head.cls_pred.bias"]
    torch.testing.assert_close(model.head.cls_pred.bias.sigmoid(), torch.full((45,), 0.05))
    assert 0.008 < model.head.cls_pred.weight.std() < 0.012
    assert_complete(report, model, set(make_model(*R18).state_dict()))
    assert "the file has 3 classes, the model 5" in report.summary()


def test_class_rows_are_copied_by_name(tmp_path):
    source = make_model(*R18)
    file = checkpoint(tmp_path / "w.pth", source, make_cfg(*R18), classes=("cat", "dog", "cow"))
    model = make_model(*R18, "MODEL.NUM_CLASSES", 2)
    report = load_weights(model, file, classes=["cow", "bee"])
    assert report.reshaped == ["head.cls_pred.weight", "head.cls_pred.bias"]
    theirs = source.head.cls_pred.weight.unflatten(0, (9, 3))
    ours = model.head.cls_pred.weight.unflatten(0, (9, 2))
    torch.testing.assert_close(ours[:, 0], theirs[:, 2], rtol=0, atol=0)
    assert "1 of 2 classes are copied by name; new: bee" in report.summary()


def test_names_given_for_the_file_are_preferred_to_its_own(tmp_path):
    source = make_model(*R18)
    file = checkpoint(tmp_path / "w.pth", source, make_cfg(*R18), classes=("a", "b", "c"))
    model = make_model(*R18)
    load_weights(model, file, classes=["z", "y", "x"], source_classes=["x", "y", "z"])
    ours, theirs = (m.head.cls_pred.bias.unflatten(0, (9, 3)) for m in (model, source))
    torch.testing.assert_close(ours, theirs.flip(1), rtol=0, atol=0)


def test_names_that_do_not_fit_the_file_yield_to_its_own(tmp_path):
    file = checkpoint(tmp_path / "w.pth", make_model(*R18), make_cfg(*R18), classes=("cat", "dog", "cow"))
    model = make_model(*R18, "MODEL.NUM_CLASSES", 2)
    report = load_weights(model, file, classes=["dog", "cat"], source_classes=["made", "for", "another", "file"])
    assert "2 of 2 classes are copied by name" in report.summary()


def test_numbers_in_place_of_names_do_not_hide_equal_counts(tmp_path):
    source = make_model(*R18)
    file = checkpoint(tmp_path / "w.pth", source, make_cfg(*R18), classes=("cat", "dog", "cow"))
    report = build_weights(make_cfg(*R18, "MODEL.WEIGHTS", file), make_model(*R18), ["class 1", "class 2", "class 3"])
    assert report.reinitialised == []


def test_anchors_of_a_checkpoint_are_brought_into_the_models_order(tmp_path):
    theirs = ("MODEL.ANCHORS.CONVENTION", "torchvision")
    source = make_model(*R18, *theirs)
    file = checkpoint(tmp_path / "w.pth", source, make_cfg(*R18, *theirs))
    model = make_model(*R18)
    report = load_weights(model, file, inputs=Inputs(anchors=AnchorOrder("detectron2", (0.5, 1.0, 2.0), 3)))
    # torchvision's anchor 1 is ratio 0.5 with the second size, which detectron2 has at place 3
    for name in ("cls_pred", "box_pred"):
        ours, held = (getattr(m.head, name).weight.unflatten(0, (9, -1)) for m in (model, source))
        torch.testing.assert_close(ours[3], held[1], rtol=0, atol=0)
        assert f"head.{name}.weight" in report.converted
    assert [warning.split(":")[0] for warning in report.warnings] == ["MODEL.ANCHORS.CONVENTION"]


def test_another_ratio_order_of_the_same_convention_is_turned_only_for_our_own_files(tmp_path):
    wanted = Inputs(anchors=AnchorOrder("detectron2", (1.0, 2.0, 0.5), 3))
    source = make_model(*R18)
    model = make_model(*R18, "MODEL.ANCHORS.ASPECT_RATIOS", [1.0, 2.0, 0.5])
    load_weights(model, checkpoint(tmp_path / "w.pth", source, make_cfg(*R18)), inputs=wanted)
    ours, held = (m.head.box_pred.bias.unflatten(0, (9, -1)) for m in (model, source))
    torch.testing.assert_close(ours, held[[1, 2, 0, 4, 5, 3, 7, 8, 6]], rtol=0, atol=0)
