"""The batch recipe against numbers worked out by hand, and what no batch size may change."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retinanet.config import batch_recipe, get_cfg


def recipe(**solver):
    cfg = get_cfg()
    for key, value in solver.items():
        if key == "EVAL_PERIOD":
            cfg.TEST.EVAL_PERIOD = value
        else:
            cfg.SOLVER[key] = value
    return batch_recipe(cfg)


def test_two_images_instead_of_sixteen_learn_eight_times_slower_and_longer():
    found = recipe(IMS_PER_BATCH=2, EVAL_PERIOD=5000)
    assert found.base_lr == pytest.approx(0.00125)
    assert (found.max_iter, found.steps, found.warmup_iters) == (720000, (480000, 640000), 4000)
    assert (found.eval_period, found.checkpoint_period) == (40000, 40000)


def test_accumulated_images_count():
    by_two, at_once = recipe(IMS_PER_BATCH=2, ACCUMULATE=4), recipe(IMS_PER_BATCH=8)
    assert (by_two.base_lr, by_two.max_iter) == (at_once.base_lr, at_once.max_iter) == (0.005, 180000)


def test_reference_batch_changes_nothing():
    found = recipe()
    assert (found.base_lr, found.max_iter, found.steps, found.warmup_iters) == (0.01, 90000, (60000, 80000), 500)
    assert len(found.reasons) == 1


def test_zero_reference_batch_keeps_every_key_as_written():
    found = recipe(IMS_PER_BATCH=2, REFERENCE_BATCH=0)
    assert (found.base_lr, found.max_iter) == (0.01, 90000)
    assert "REFERENCE_BATCH is 0" in found.reasons[0]


def test_counts_never_fall_below_one_and_zero_stays_zero():
    found = recipe(IMS_PER_BATCH=64, MAX_ITER=2, STEPS=(1,), WARMUP_ITERS=1, CHECKPOINT_PERIOD=1, EVAL_PERIOD=0)
    assert (found.max_iter, found.steps, found.warmup_iters, found.checkpoint_period) == (1, (1,), 1, 1)
    assert found.eval_period == 0
    assert recipe(IMS_PER_BATCH=2, WARMUP_ITERS=0).warmup_iters == 0


def test_reasons_name_the_rule_and_each_change():
    reasons = recipe(IMS_PER_BATCH=8).reasons
    assert "1706.02677" in reasons[0]
    assert "IMS_PER_BATCH 8 x ACCUMULATE 1" in reasons[0]
    assert "batch recipe: SOLVER.BASE_LR 0.01 -> 0.005" in reasons
    assert "batch recipe: SOLVER.STEPS (60000, 80000) -> (120000, 160000)" in reasons
    assert not any("EVAL_PERIOD" in line for line in reasons)  # 0 before and after


@settings(deadline=None)
@given(st.integers(1, 256), st.integers(1, 8), st.integers(1, 256))
def test_images_seen_and_rate_times_length_do_not_depend_on_the_batch(images, accumulate, reference):
    found = recipe(IMS_PER_BATCH=images, ACCUMULATE=accumulate, REFERENCE_BATCH=reference)
    batch = images * accumulate
    assert abs(found.max_iter * batch - 90000 * reference) <= batch / 2 + 1e-6
    assert found.base_lr / batch == pytest.approx(0.01 / reference)
    assert found.steps[0] <= found.steps[1] <= found.max_iter
