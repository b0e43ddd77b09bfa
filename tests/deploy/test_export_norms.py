"""Every norm of the table survives export: the exported model detects what the model detects."""

from functools import partial
from itertools import cycle, islice

import pytest
import torch
from model_cases import randomize, small_cfg

from retinanet.data.loader import build_image_batcher
from retinanet.deploy.export import build_facts, export, make_graph, trace
from retinanet.deploy.exported import Exported
from retinanet.engine.evaluate import detect
from retinanet.engine.parity import Parity, made_up_pictures
from retinanet.layers.norm import NORMS
from retinanet.modeling.backbone import BACKBONES
from retinanet.modeling.backbone.resnet import ResNet
from retinanet.modeling.build import build_model, build_postprocess
from retinanet.modeling.postprocess import best_candidates

CLASSES = [{"id": number, "name": f"class {number}"} for number in (1, 4, 9)]


# Each norm in one part at least: backbone, FPN and head of a model have three names that follow each other.
TRIPLES = [tuple(islice(cycle(NORMS), start, start + 3)) for start in range(0, len(NORMS), 3)]


@pytest.fixture
def detector(monkeypatch):
    """The function three norms -> configuration, small model with scores between 0 and 1, and batches of pictures."""
    monkeypatch.setitem(BACKBONES, "R18", partial(ResNet, blocks=(1, 1, 1, 1), bottleneck=False))
    opts = ["MODEL.NORM_OPTIONS.GN.GROUPS", 4, "MODEL.NORM_OPTIONS.BCN.GROUPS", 4, "TEST.PRE_NMS_TOPK", 60]
    opts += ["INPUT.MIN_SIZE_TEST", 64, "INPUT.MAX_SIZE_TEST", 96]

    def make(norms: tuple[str, str, str]):
        cfg = small_cfg("NORMS", norms, *opts)
        torch.manual_seed(0)
        model, batcher = randomize(build_model(cfg)).eval(), build_image_batcher(cfg)
        batches = [batcher(pictures) for pictures in made_up_pictures()]
        with torch.no_grad():
            logits = torch.cat(model(model.normalize(batches[0].images, batches[0].image_sizes))["logits"], 1)
            model.head.cls_pred.weight.div_(logits.std())
            model.head.cls_pred.bias.fill_(-float(logits.mean() / logits.std()) - 2)
        return cfg, model, batches

    return make


@pytest.mark.parametrize("norms", TRIPLES, ids="-".join)
def test_traced_candidates_of_every_norm_are_those_of_the_model(detector, norms):
    """Sorted by score, so that rounding may swap two: scores are compared, and the boxes of scores that stand apart."""
    cfg, model, batches = detector(norms)
    facts, postprocess = build_facts(cfg, CLASSES, None, "outside"), build_postprocess(cfg)
    program = trace(make_graph(model, facts, postprocess, "pt2")[0], facts).module()
    for batch in batches:
        outputs = model(model.normalize(batch.images, batch.image_sizes))
        expected = best_candidates(outputs, postprocess.score_thresh, 60, postprocess.convention)
        boxes, scores, labels = program(batch.images, batch.image_sizes)
        count = expected.valid.sum(1)
        assert (scores > 0).sum(1).tolist() == count.tolist() and count.min() > 20
        for image, number in enumerate(count.tolist()):
            wanted = expected.scores[image, :number]
            torch.testing.assert_close(scores[image, :number], wanted, rtol=1e-4, atol=1e-5)
            gap = torch.cat([wanted.new_ones(1), -wanted.diff(), wanted.new_ones(1)])
            apart = torch.minimum(gap[:-1], gap[1:]) > 1e-4
            assert apart.sum() > 10
            assert torch.equal(labels[image, :number][apart], expected.labels[image, :number][apart])
            found, box = boxes[image, :number][apart], expected.boxes[image, :number][apart]
            torch.testing.assert_close(found, box, rtol=1e-4, atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pt2", "onnx"])
@pytest.mark.parametrize("norm", NORMS)
def test_file_of_every_norm_in_all_parts_detects_what_the_model_detects(detector, norm, kind, tmp_path):
    cfg, model, batches = detector((norm,) * 3)
    postprocess, found = build_postprocess(cfg), Parity()
    write, _ = export(model, build_facts(cfg, CLASSES, None, "inside"), postprocess, kind)
    with open(tmp_path / f"model.{kind}", "wb") as file:
        write(file)
    exported = Exported(tmp_path / f"model.{kind}")
    for batch in batches:
        found.add(detect(model, batch, postprocess), detect(exported, batch, postprocess))
    assert found.equal and found.expected > 100 and found.box < 0.01 and found.score < 1e-4, found
