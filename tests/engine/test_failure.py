"""A step that is not finite leaves model and statistics as they were, and its file repeats it exactly."""

import copy
import json

import pytest
import torch
from step_cases import GN, new_batch, new_trainer, rows_of, state

from retinanet.engine.checkpoint import read_checkpoint
from retinanet.engine.failure import FailedStep, NonFiniteError, kept_failures, read_failed_batch
from retinanet.engine.progress import Progress
from retinanet.engine.replay import replay
from retinanet.engine.train import train_step
from retinanet.errors import UserError
from retinanet.structures import Batch


def bad_batch(count: int = 2) -> Batch:
    """The batch of seed 1 with an infinite pixel in its second image."""
    batch = new_batch(count, seed=1)
    batch.images = batch.images.float()
    batch.images[1, 0, 5, 5] = float("inf")
    return batch


def saved(trainer, tmp_path, batches: list[Batch], values: dict) -> dict:
    """The file of a step that failed in iteration 2 with these values."""
    keep = FailedStep(
        read=lambda step: {1: [batches]}[step],
        files=lambda ids: [f"{image_id}.jpg" for image_id in ids],
        folder=tmp_path,
        describe={"config": "", "classes": []},
        command=lambda path: f"replay {path.name}",
    )
    numbers = {name: float(value) for name, value in values.items()}
    kept = kept_failures(trainer.model, trainer.loss, trainer.guard, keep)
    with pytest.raises(NonFiniteError, match="replay failed_batch_0000002.pth"), kept:
        raise NonFiniteError("iteration 2: wrong", 2, 0.01, numbers)
    return read_failed_batch(tmp_path / "failed_batch_0000002.pth")


@pytest.mark.parametrize("norms", [("BN", "MABN", "BCN")], ids="-".join)
def test_steps_after_a_failed_one_change_nothing_that_is_kept(norms):
    """On a GPU the host reads values every LOG_PERIOD iterations: until then the state of the failed step stays."""
    trainer = new_trainer("NORMS", norms, "MODEL.LOSS.NORMALIZER", "ema")
    train_step(trainer, [new_batch(2)])
    model, loss = copy.deepcopy(trainer.model.state_dict()), copy.deepcopy(trainer.loss.state_dict())
    for batch in (bad_batch(), new_batch(2, seed=2), new_batch(2, seed=3)):
        train_step(trainer, [batch])
    kept = trainer.guard.buffers()
    torch.testing.assert_close({**trainer.model.state_dict(), **kept["model"]}, model, rtol=0, atol=0)
    torch.testing.assert_close(kept["loss"], dict(loss), rtol=0, atol=0)


def test_a_loss_scaler_skips_overflow_alone_but_stops_after_a_loss_that_is_not_finite():
    trainer = new_trainer(*GN)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    first = train_step(trainer, [new_batch(2)])
    assert first["loss_scale"] == 2**16
    before = state(trainer)
    trainer.scaler._scale.fill_(float("inf"))  # every gradient overflows
    overflowed = train_step(trainer, [new_batch(2)])
    assert not torch.isfinite(overflowed["grad_norm"]) and torch.isfinite(overflowed["loss"])
    torch.testing.assert_close(state(trainer), before, rtol=0, atol=0)
    assert not trainer.guard.failed
    trainer.scaler._scale.fill_(2.0**10)
    assert torch.isfinite(train_step(trainer, [new_batch(2)])["grad_norm"])
    before = state(trainer)
    train_step(trainer, [bad_batch()])
    assert trainer.guard.failed
    train_step(trainer, [new_batch(2)])
    torch.testing.assert_close(state(trainer), before, rtol=0, atol=0)


def test_a_loss_scale_that_collapses_stops_the_run():
    progress = Progress(None, 4, torch.device("cpu"), skips_overflow=True)
    values = {"loss": 1.0, "loss_cls": 0.5, "loss_box": 0.5, "grad_norm": float("inf"), "num_fg": 3.0}
    tensors = {name: torch.tensor(value) for name, value in values.items()}
    progress.add(1, 0.1, [new_batch(1)], {**tensors, "loss_scale": torch.tensor(1.0)})
    with pytest.raises(NonFiniteError, match="overflows float16 step after step.*loss_scale 0.5.*AMP bf16 or off"):
        progress.add(2, 0.1, [new_batch(1)], {**tensors, "loss_scale": torch.tensor(0.5)})


def test_lines_count_overflows_and_stay_json(tmp_path):
    from retinanet.utils.log import MetricsWriter

    progress = Progress(MetricsWriter(tmp_path, tensorboard=False), 4, torch.device("cpu"), skips_overflow=True)
    for iteration, (norm, scale) in enumerate(((float("inf"), 8.0), (2.0, 4.0), (4.0, 4.0)), start=1):
        values = {"loss": 1.0, "loss_cls": 0.5, "loss_box": 0.5, "grad_norm": norm, "num_fg": 3.0, "loss_scale": scale}
        tensors = {name: torch.tensor(value) for name, value in values.items()}
        progress.add(iteration, 0.1, [new_batch(1)], tensors)
    progress.write_line(3, 0.1)
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert (line["grad_norm"], line["loss_scale"], line["skipped"]) == (3.0, 4.0, 1)


@pytest.mark.parametrize("norms", [("BN", "MABN", "BCN")], ids="-".join)
def test_a_replay_computes_what_the_step_computed(norms, tmp_path):
    """Of two micro-batches, with statistics that have moved; here on values that are finite."""
    trainer = new_trainer("NORMS", norms, "MODEL.LOSS.NORMALIZER", "ema")
    train_step(trainer, [new_batch(2)])
    batches = [new_batch(2, seed=1), new_batch(2, seed=2)]
    values = train_step(trainer, batches)
    weights_before = new_trainer("NORMS", norms, "MODEL.LOSS.NORMALIZER", "ema")
    train_step(weights_before, [new_batch(2)])
    weights_before.guard = trainer.guard  # the statistics of the step, and the weights before it
    failed = saved(weights_before, tmp_path, batches, values)
    found = replay(new_trainer("NORMS", norms, "MODEL.LOSS.NORMALIZER", "ema"), failed, torch.device("cpu"))
    text = "\n".join(found.lines)
    assert not found.reproduced, text
    assert float(text.rsplit(" ", 1)[1]) == pytest.approx(float(values["grad_norm"]), rel=1e-3), text
    for name in ("loss_cls", "loss_box"):
        own = sum(float(line.split(f"{name} ")[1].split(",")[0]) for line in found.lines if name in line)
        assert own == pytest.approx(float(values[name]), rel=2e-3)  # four digits each are printed


def test_a_replay_names_the_image_the_layer_and_the_gradient(tmp_path):
    trainer = new_trainer(*GN)
    values = train_step(trainer, [bad_batch()])
    found = replay(new_trainer(*GN), saved(trainer, tmp_path, [bad_batch()], values), torch.device("cpu"))
    text = "\n".join(found.lines)
    assert found.reproduced
    assert "image 1 1.jpg: 64 x 64 pixels, 2 boxes" in text
    clean = next(line for line in found.lines if line.startswith("image 0"))
    assert "nan" not in clean
    assert "forwards: what goes into backbone (2 x 3 x 64 x 64, float32): 1 of 24576 values" in text
    assert "in images 1 of the batch" in text
    assert "first not finite on the way back: the gradient of head." in text


def test_a_replay_names_weights_that_ran_away(tmp_path):
    trainer = new_trainer(*GN)
    train_step(trainer, [new_batch(2)])
    with torch.no_grad():
        trainer.model.fpn.get_parameter(next(n for n, p in trainer.model.fpn.named_parameters() if p.dim() == 4)).fill_(
            1e38
        )
    found = replay(new_trainer(*GN), saved(trainer, tmp_path, [new_batch(2)], {"loss": 1.0}), torch.device("cpu"))
    assert any(line.startswith("before the step, the largest weight was 1e+38, in fpn.") for line in found.lines)
    assert any("have run away" in line for line in found.lines)


def test_two_ranks_are_replayed_with_their_own_statistics(tmp_path, monkeypatch):
    """Each process divides by half of the divisor, so the mean of their gradients is that of the big batch."""
    norms = ("NORMS", ("GN", "GN", "GN"))
    whole = new_trainer(*norms)
    both = new_batch(4)
    values = train_step(whole, [both])
    parts = [rows_of(both, rows) for rows in (slice(0, 1), slice(1, 4))]
    trainer = new_trainer(*norms)
    trainer.guard.begin()
    failed = saved(trainer, tmp_path, [both], values)
    failed["ranks"] = [{"batches": [vars(part)], "buffers": {}} for part in parts]
    found = replay(new_trainer(*norms), failed, torch.device("cpu"))
    assert float(found.lines[-1].rsplit(" ", 1)[1]) == pytest.approx(float(values["grad_norm"]), rel=1e-3)


@pytest.mark.parametrize("content", [b"", b"no file of torch", None])
def test_files_that_are_no_saved_batch_are_refused(tmp_path, content):
    path = tmp_path / "failed_batch_0000001.pth"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="no such file" if content is None else "not a saved batch, or damaged"):
        read_failed_batch(path)
    torch.save({"format": "retinanet"}, path)
    with pytest.raises(UserError, match="not a batch that a failed run saved"):
        read_failed_batch(path)
    with pytest.raises(UserError):
        read_checkpoint(path)


def test_a_batch_that_cannot_be_saved_leaves_the_message(tmp_path):
    trainer = new_trainer(*GN)
    train_step(trainer, [new_batch(2)])
    (tmp_path / "file").write_text("")
    keep = FailedStep(lambda step: [[new_batch(2)]], lambda ids: [""] * len(ids), tmp_path / "file", {}, str)
    kept = kept_failures(trainer.model, trainer.loss, trainer.guard, keep)
    with pytest.raises(NonFiniteError, match="iteration 2: wrong. Its batch could not be saved: .*file"), kept:
        raise NonFiniteError("iteration 2: wrong", 2, 0.01, {"loss": 1.0})


def test_sync_bn_is_replayed_on_the_images_of_all_processes(tmp_path):
    norms = ("NORMS", ("SyncBN", "GN", "GN"))
    trainer, both = new_trainer(*norms), new_batch(4)
    values = train_step(trainer, [both])
    fresh = new_trainer(*norms)
    fresh.guard.begin()
    failed = saved(fresh, tmp_path, [both], values)
    parts = [rows_of(both, rows) for rows in (slice(0, 2), slice(2, 4))]
    parts[0].gt_boxes, parts[0].gt_labels = (
        parts[0].gt_boxes[:, :2],
        parts[0].gt_labels[:, :2],
    )  # padded to another count
    failed["ranks"] = [{"batches": [vars(part)], "buffers": {}} for part in parts]
    found = replay(new_trainer(*norms), failed, torch.device("cpu"))
    assert float(found.lines[-1].rsplit(" ", 1)[1]) == pytest.approx(float(values["grad_norm"]), rel=1e-3)
