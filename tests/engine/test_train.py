"""One optimizer step: it never waits for the device, skips what is not finite, and adds micro-batches up."""

import copy

import pytest
import torch
from detection_cases import SyncWatch
from step_cases import GN, NORMS, new_batch, new_trainer, rows_of, state

from retinanet.engine.ema import model_ema
from retinanet.engine.train import train_step


@pytest.mark.parametrize("norms", NORMS, ids="-".join)
def test_a_step_changes_the_weights_and_does_not_wait_for_the_device(norms):
    # groups of one channel are zero at the one position of P6
    trainer = new_trainer("NORMS", norms, "MODEL.NORM_OPTIONS.GN.GROUPS", 8)
    before = state(trainer)
    with SyncWatch() as watch:
        values = train_step(trainer, [new_batch(2)])
    assert not watch.waits, watch.waits
    assert all(value.dim() == 0 and torch.isfinite(value) for value in values.values())
    for name, parameter in trainer.model.named_parameters():
        assert trainer.optimizer.state[parameter]["momentum_buffer"].any() == parameter.requires_grad, name
        if parameter.dim() == 4:
            assert not torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("normalizer", ["batch", "image", "ema"])
def test_micro_batches_add_up_to_the_big_batch(normalizer):
    whole = new_batch(4)
    parts = [rows_of(whole, rows) for rows in (slice(0, 1), slice(1, 4))]
    big, small = (new_trainer(*GN, "MODEL.LOSS.NORMALIZER", normalizer) for _ in range(2))
    for _ in range(2):
        first, second = train_step(big, [whole]), train_step(small, parts)
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state(big), state(small), rtol=1e-5, atol=1e-6)


def test_a_step_that_is_not_finite_leaves_the_weights_alone():
    trainer = new_trainer(*GN)
    train_step(trainer, [new_batch(2)])
    before, optimizer = state(trainer), copy.deepcopy(trainer.optimizer.state_dict())
    bad = new_batch(2)
    bad.images = bad.images.float()
    bad.images[0, 0, 5, 5] = float("inf")
    values = train_step(trainer, [bad])
    assert not torch.isfinite(values["loss"] + values["grad_norm"])
    torch.testing.assert_close(state(trainer), before, rtol=0, atol=0)
    torch.testing.assert_close(trainer.optimizer.state_dict()["state"], optimizer["state"], rtol=0, atol=0)


def test_a_first_step_that_is_skipped_leaves_no_trace(monkeypatch):
    """Under loss scaling the first steps overflow as a rule."""
    plain, skipped = new_trainer(*GN), new_trainer(*GN)
    monkeypatch.setattr("torch.empty_like", lambda tensor, **_: torch.full_like(tensor, float("nan")))
    bad = new_batch(2)
    bad.images = bad.images.float() * float("inf")
    train_step(skipped, [bad])
    skipped.guard.clear()
    for trainer in (plain, skipped):
        train_step(trainer, [new_batch(2)])
    torch.testing.assert_close(state(skipped), state(plain), rtol=0, atol=0)


def test_a_resumed_run_keeps_its_momentum_and_follows_the_configuration_in_the_rest():
    first = new_trainer(*GN)
    train_step(first, [new_batch(2)])
    changed = new_trainer(*GN, "SOLVER.WEIGHT_DECAY", 0.5, "SOLVER.MOMENTUM", 0.25)
    changed.load_state(copy.deepcopy(first.state()))
    groups = {group["name"]: group for group in changed.optimizer.param_groups}
    assert (groups["weights"]["weight_decay"], groups["weights"]["momentum"]) == (0.5, 0.25)
    one, other = (trainer.optimizer.state_dict()["state"] for trainer in (first, changed))
    torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize(("before", "after"), [("False", "True"), ("True", "False")])
def test_a_run_resumes_in_another_memory_format(before, after):
    def new(channels_last):
        return new_trainer(*GN, "SOLVER.CHANNELS_LAST", repr(channels_last))

    first, resumed = new(before), new(after)
    train_step(first, [new_batch(2)])
    resumed.load_state(copy.deepcopy(first.state()))
    for trainer in (first, resumed):  # of which momentum makes up one half
        train_step(trainer, [new_batch(2, seed=1)])
    torch.testing.assert_close(state(resumed), state(first), rtol=1e-3, atol=1e-4)


def test_empty_images_train():
    trainer = new_trainer(*GN)
    values = train_step(trainer, [new_batch(2, boxes=0)])
    assert (values["num_fg"], values["loss_box"]) == (0, 0)
    assert values["loss_cls"] > 0


def test_clipping_caps_the_step_and_reports_the_norm_before_it():
    free, capped = new_trainer(*GN), new_trainer(*GN, clip_grad_norm=1e-3)
    one, other = train_step(free, [new_batch(2)]), train_step(capped, [new_batch(2)])
    assert one["grad_norm"] == other["grad_norm"] > 1e-3
    name, start = "head.cls_pred.weight", new_trainer(*GN).model.head.cls_pred.weight
    long, short = ((state(t)[name] - start).norm() for t in (free, capped))
    assert short < long * 2e-3 / float(one["grad_norm"])


def test_averaged_weights_follow_their_formula_and_counters_are_copied():
    trainer = new_trainer("NORMS", ("MABN", "MABN", "MABN"))
    trainer.ema = model_ema(trainer.model, 0.9)
    train_step(trainer, [new_batch(2)])
    first = state(trainer)
    train_step(trainer, [new_batch(2, seed=1)])
    second, averaged = state(trainer), trainer.ema.module.state_dict()
    for name, value in averaged.items():
        expected = 0.9 * first[name] + 0.1 * second[name] if value.is_floating_point() else second[name]
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6, msg=name)
