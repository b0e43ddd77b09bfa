"""Every norm, with what a configuration can add, killed at random moments: resumed, it equals the whole run."""

import itertools
import random
import time

import pytest
from run_cases import write_data
from training_cases import assert_same_run, finish, start

from retinanet.config.check import NORMS

LENGTH, KILLS = 12, 3
ACCUMULATION = ["SOLVER.IMS_PER_BATCH", "2", "SOLVER.ACCUMULATE", "2"]
AVERAGE, HALF = ["SOLVER.EMA_DECAY", "0.9"], ["SOLVER.AMP", "bf16"]
ALL = [*ACCUMULATION, *AVERAGE, *HALF]
CASES = [  # norm, workers, processes, more
    *(("MABN", 2, 1, ALL), ("BCN", 0, 2, ACCUMULATION), ("BN", 2, 2, HALF), ("SyncBN", 0, 2, AVERAGE)),
    *(("GN", 2, 1, ALL), ("MABN", 0, 2, ALL), ("BCN", 0, 1, ALL), ("BN", 0, 1, ALL), ("GN", 0, 2, ALL)),
    *(("FrozenBN", 2, 1, HALF), ("AffineChannel", 2, 2, ACCUMULATION), ("", 2, 1, AVERAGE)),
    *(("MABN", 0, 1, []), ("BCN", 2, 2, HALF), ("SyncBN", 2, 1, ACCUMULATION), ("BN", 0, 2, AVERAGE)),
    *(("AffineChannel", 0, 1, AVERAGE), ("FrozenBN", 0, 2, AVERAGE), ("", 0, 2, []), ("BCN", 2, 1, AVERAGE)),
    *(("MABN", 2, 2, AVERAGE), ("BN", 2, 1, []), ("GN", 0, 1, HALF), ("GN", 2, 2, []), ("", 2, 1, ALL)),
    *(("FrozenBN", 0, 1, ACCUMULATION), ("AffineChannel", 2, 1, HALF), ("SyncBN", 2, 2, HALF)),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


def test_every_pair_of_choices_is_in_a_case():
    """Norm, workers, processes, accumulation, average and half precision: any choice of one with any of another."""
    rows = [
        (norm, workers, processes, *(key in more for key in (ACCUMULATION[2], AVERAGE[0], HALF[0])))
        for norm, workers, processes, more in CASES
    ]
    assert {row[0] for row in rows} == {"", *NORMS}
    for one, other in itertools.combinations(zip(*rows, strict=True), 2):
        assert set(zip(one, other, strict=True)) == set(itertools.product(set(one), set(other)))


@pytest.mark.slow
@pytest.mark.parametrize(("norm", "workers", "processes", "more"), CASES)
def test_killed_at_random_it_equals_the_run_that_was_not(data, tmp_path, norm, workers, processes, more):
    options = [
        *("SOLVER.MAX_ITER", str(LENGTH), "SOLVER.CHECKPOINT_PERIOD", "3", "TEST.EVAL_PERIOD", "4", "--resume"),
        *("MODEL.BACKBONE.NORM", norm, "MODEL.FPN.NORM", norm, "MODEL.HEAD.NORM", norm),
        *("DATALOADER.NUM_WORKERS", str(workers), *more),
    ]
    begin = time.monotonic()
    assert finish(start(data, tmp_path / "whole", *options, processes=processes)) == [0] * processes
    length = time.monotonic() - begin
    generator, killed = random.Random(f"{norm}{workers}{processes}"), tmp_path / "killed"
    for _ in range(KILLS):
        finish(start(data, killed, *options, processes=processes), kill_after=generator.uniform(0.2, 0.9) * length)
    last = finish(start(data, killed, *options, processes=processes))
    assert last == [0] * processes, (killed / "console0.txt").read_text()[-3000:]
    assert_same_run(tmp_path / "whole", killed, LENGTH)
