"""The order of training: stateless, resumable, the same for any split over ranks and micro-batches."""

from itertools import islice

import numpy as np
import pytest

from retinanet.data.sampler import (
    TrainSampler,
    aspect_groups,
    eval_batches,
    repeat_factors,
    trainable_rows,
)
from retinanet.errors import UserError


def sampler(num_images=23, images_per_step=4, seed=5, **options) -> TrainSampler:
    return TrainSampler(np.arange(num_images), images_per_step, seed, **options)


def take(made: TrainSampler, count: int) -> list[list]:
    """The samples that this rank loads, of `count` micro-batches."""
    return [batch.samples[batch.start : batch.stop] for batch in islice(made, count)]


def steps(made: TrainSampler, count: int) -> list[list[int]]:
    return [[sample.index for sample in samples] for samples in take(made, count)]


def test_every_image_comes_once_per_epoch():
    rows = np.concatenate(steps(sampler(24, 4), 12))  # two epochs of 6 steps
    for epoch in (rows[:24], rows[24:]):
        assert sorted(epoch.tolist()) == list(range(24))
    assert rows[:24].tolist() != rows[24:].tolist() and rows[:24].tolist() != list(range(24))


def test_images_left_at_the_end_of_an_epoch_lead_the_next():
    rows = np.concatenate(steps(sampler(23, 4), 23))  # exactly four epochs
    assert np.bincount(rows).tolist() == [4] * 23
    assert sorted(rows[:23].tolist()) == list(range(23))


def test_seed_changes_the_order_and_nothing_else_does():
    assert steps(sampler(seed=1), 9) == steps(sampler(seed=1), 9)
    assert steps(sampler(seed=1), 9) != steps(sampler(seed=2), 9)
    np.random.seed(3)
    assert steps(sampler(seed=1), 9) == steps(sampler(seed=1), 9)


def options_of(num_images: int) -> dict:
    generator = np.random.default_rng(0)
    return {"groups": generator.integers(0, 2, num_images), "factors": 1 + generator.random(num_images)}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("start", [0, 1, 2, 7, 30, 61])
def test_starting_at_an_iteration_equals_skipping_to_it(start, accumulate):
    options = {"accumulate": accumulate, **options_of(23)}
    whole = take(sampler(**options), start + 12)
    assert take(sampler(start_iteration=start, **options), 12) == whole[start:]


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_what_one_process_has(world_size):
    alone = take(sampler(images_per_step=8, **options_of(23)), 20)
    ranks = [
        take(sampler(images_per_step=8, rank=rank, world_size=world_size, **options_of(23)), 20)
        for rank in range(world_size)
    ]
    assert [sum(parts, []) for parts in zip(*ranks, strict=True)] == alone


@pytest.mark.parametrize("accumulate, world_size", [(2, 1), (4, 2), (8, 1)])
def test_micro_batches_of_a_step_are_the_step(accumulate, world_size):
    alone = take(sampler(images_per_step=8, **options_of(23)), 10)
    parts = [[] for _ in range(10)]
    for rank in range(world_size):
        made = sampler(images_per_step=8, accumulate=accumulate, rank=rank, world_size=world_size, **options_of(23))
        for number, samples in enumerate(take(made, 10 * accumulate)):
            assert len(samples) == 8 // (accumulate * world_size)
            parts[number // accumulate] += samples
    assert [sorted(samples) for samples in parts] == [sorted(samples) for samples in alone]


def test_all_ranks_see_all_samples_of_their_micro_batch():
    ranks = [list(islice(sampler(images_per_step=8, accumulate=2, rank=r, world_size=2), 6)) for r in (0, 1)]
    for first, second in zip(*ranks, strict=True):
        assert first.samples == second.samples and len(first.samples) == 4
        assert (first.start, first.stop, second.start, second.stop) == (0, 2, 2, 4)


def test_positions_count_through_the_step():
    batches = take(sampler(images_per_step=4, accumulate=2), 6)
    assert [[(s.step, s.position) for s in batch] for batch in batches[:4]] == [
        [(0, 0), (0, 1)],
        [(0, 2), (0, 3)],
        [(1, 0), (1, 1)],
        [(1, 2), (1, 3)],
    ]


def test_a_step_holds_one_group_only_and_nothing_is_lost():
    groups = np.array([0] * 15 + [1] * 8)
    made = steps(sampler(23, 4, groups=groups), 230)
    assert all(len({int(groups[row]) for row in step}) == 1 for step in made)
    counts = np.bincount(np.concatenate(made))
    assert counts.min() >= 39 and counts.max() <= 41  # 230 steps of 4 are 40 epochs of 23


def test_queues_fill_in_the_order_of_the_epoch():
    """Slow reference: one image at a time into its queue."""
    groups = np.random.default_rng(1).integers(0, 3, 31)
    made = sampler(31, 4, groups=groups)
    queues, expected = {0: [], 1: [], 2: []}, []
    for epoch in range(6):
        for place in made._epoch(epoch).tolist():
            queue = queues[int(groups[place])]
            queue.append(place)
            if len(queue) == 4:
                expected.append(list(queue))
                queue.clear()
    assert min(np.bincount(groups)) >= 4
    assert steps(made, len(expected)) == expected


def test_group_smaller_than_a_step_joins_the_largest():
    groups = np.array([0] * 20 + [1] * 3)
    rows = np.concatenate(steps(sampler(23, 4, groups=groups), 23))
    assert np.bincount(rows).tolist() == [4] * 23
    assert max(len(step) - len(set(step)) for step in steps(sampler(23, 4, groups=groups), 23)) <= 1


def test_fewer_images_than_a_step_fill_it_over_epochs():
    made = steps(sampler(3, 8), 6)
    assert np.bincount(np.concatenate(made)).tolist() == [16, 16, 16]
    assert steps(sampler(1, 2), 3) == [[0, 0]] * 3


def test_rows_name_images_of_the_data_set():
    made = TrainSampler(np.array([4, 7, 9]), 3, seed=0)
    assert sorted(steps(made, 1)[0]) == [4, 7, 9]


def test_repeat_factors_by_hand():
    # 4 images; class 0 in all, class 1 in one of 4, class 2 in none, class 3 in one of 4 but twice
    counts = np.array([1, 2, 1, 3])
    labels = np.array([0, 0, 1, 0, 0, 3, 3])
    expected = [1, 2**0.5, 1, 2**0.5]  # sqrt(0.5 / 0.25)
    np.testing.assert_allclose(repeat_factors(counts, labels, 0.5), expected)
    np.testing.assert_allclose(repeat_factors(counts, labels, 0.25), np.ones(4))
    np.testing.assert_allclose(repeat_factors(np.zeros(3, int), np.zeros(0, int), 0.5), np.ones(3))


def test_images_come_as_often_as_their_factors_say():
    factors = np.array([1.0, 1.3, 2.5, 1.0])
    made = sampler(4, 1, factors=factors)
    epochs = [np.bincount(made._epoch(epoch), minlength=4) for epoch in range(400)]
    np.testing.assert_allclose(np.mean(epochs, axis=0), factors, atol=0.08)
    assert {int(epoch[2]) for epoch in epochs} == {2, 3} and {int(epoch[0]) for epoch in epochs} == {1}


def test_only_images_taller_than_wide_are_tall():
    assert aspect_groups(np.array([[5, 6], [5, 5], [6, 5]])).tolist() == [0, 0, 1]


def test_empty_images_take_part_unless_skipped():
    counts = np.array([0, 2, 0, 1])
    assert trainable_rows(counts, skip_empty=False, name="x").tolist() == [0, 1, 2, 3]
    assert trainable_rows(counts, skip_empty=True, name="x").tolist() == [1, 3]
    with pytest.raises(UserError, match="'x': none of its 3 images has a box"):
        trainable_rows(np.zeros(3, int), skip_empty=False, name="x")


@pytest.mark.parametrize("world_size", [1, 2, 3, 40])
@pytest.mark.parametrize("images_per_batch", [1, 4, 50])
def test_evaluation_sees_every_image_exactly_once(world_size, images_per_batch):
    sizes = np.random.default_rng(0).integers(10, 99, (31, 2))
    ranks = [eval_batches(sizes, images_per_batch, rank, world_size) for rank in range(world_size)]
    rows = [row for batches in ranks for batch in batches for row in batch]
    assert sorted(rows) == list(range(31))
    assert max(map(len, ranks)) - min(map(len, ranks)) <= 1
    ratios = [[sizes[row, 0] / sizes[row, 1] for row in batch] for batch in eval_batches(sizes, 4, 0, 1)]
    assert all(max(first) <= min(second) for first, second in zip(ratios, ratios[1:], strict=False))
