"""Workers that die, run out of memory or are slow: each is named, with what to do about it."""

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from loader_cases import config, take, write_nine_images

from retinanet.data.coco import CocoDataset
from retinanet.data.loader import build_test_loader, build_train_loader
from retinanet.data.reread import files_of, read_step
from retinanet.data.waiting import usable_cores, waiting_advice
from retinanet.data.workers import Batches, BatchLoader, explained
from retinanet.errors import RunError
from retinanet.utils.memory import OutOfMemory


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_nine_images(folder)
    return CocoDataset(folder, folder / "x.json")


class Made(Batches):
    """Batches made by a function of the item."""

    def __init__(self, make):
        self.make = make

    def load(self, item):
        return self.make(item)


DEATHS = [  # what torch says, in its words
    ("DataLoader worker (pid 77) is killed by signal: Killed. ", "was ended by SIGKILL", "memory runs out"),
    ("DataLoader worker (pid 77) is killed by signal: Segmentation fault. ", "by SIGSEGV", "decoder crashed"),
    ("DataLoader worker (pid 77) is killed by signal: Bus error. It is possible that", "by SIGBUS", "--shm-size"),
    ("DataLoader worker (pid(s) 66, 77) exited unexpectedly", "(pid 66, 77) ended without a word", "memory runs out"),
    ("DataLoader worker (pid 77) exited unexpectedly with exit code 1. Details are", "ended without a word", "memory"),
]


@pytest.mark.parametrize(("error", "how", "remedy"), DEATHS)
def test_a_dead_worker_is_explained_with_the_image_it_read(dataset, error, how, remedy):
    loader = build_train_loader(config(DATALOADER__NUM_WORKERS=2), dataset)
    loader._workers = [SimpleNamespace(pid=pid, exitcode=None) for pid in (76, 77)]
    loader.dataset.board.reading[:] = torch.tensor([5, 3])
    with pytest.raises(RunError) as caught, explained(loader):
        raise RuntimeError(error)
    for part in (how, remedy, f"The last image that it began to read is {dataset.file(3)}."):
        assert part in str(caught.value)
    assert caught.value.status == 1


@pytest.mark.parametrize(("status", "how"), [(-9, "was ended by SIGKILL"), (1, "ended without"), (-99, "without a")])
def test_the_signal_that_torch_does_not_tell_is_that_of_the_process(dataset, status, how):
    loader = build_train_loader(config(DATALOADER__NUM_WORKERS=1), dataset)
    loader._workers = [SimpleNamespace(pid=77, exitcode=status)]
    said = RuntimeError("DataLoader worker (pid(s) 77) exited unexpectedly")
    for error in (said, EOFError(), ConnectionResetError()):
        assert how in str(loader.death(error))


def test_a_broken_connection_to_workers_that_live_stays_what_it_is(dataset):
    def broken(_):
        raise ConnectionResetError("a test")

    for workers in (0, 1):
        with pytest.raises(ConnectionResetError, match="a test"):
            next(iter(BatchLoader(Made(broken), range(3), workers)))


def test_a_worker_of_another_loader_is_explained_without_an_image(dataset):
    loader = build_test_loader(config(), dataset)
    assert "began to read" not in str(loader.death(RuntimeError(DEATHS[0][0])))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("build", [build_train_loader, build_test_loader])
def test_workers_tell_which_image_they_read(dataset, workers, build):
    loader = build(config(DATALOADER__NUM_WORKERS=workers), dataset)
    take(loader, 2)
    assert (loader.dataset.board.reading >= 0).all()


def test_other_errors_pass_through_unchanged(dataset):
    loader = build_train_loader(config(), dataset)
    with pytest.raises(RuntimeError, match="^shapes do not fit$"), explained(loader):
        raise RuntimeError("shapes do not fit")


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    "make", [lambda item: torch.empty(2**60), lambda item: np.empty(2**56, np.uint8)], ids=["torch", "numpy"]
)
def test_a_batch_that_does_not_fit_into_memory_says_what_to_lower(make, workers):
    with pytest.raises(OutOfMemory, match="not enough memory to load a batch .*lower DATALOADER.NUM_WORKERS") as caught:
        take(BatchLoader(Made(make), [0], workers), 1)
    assert "\n" not in str(caught.value) and caught.value.status == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_time_in_workers_is_told_apart(workers):
    def wait(item):
        time.sleep(0.1)

    def compute(item):
        end = time.thread_time() + 0.1
        while time.thread_time() < end:
            pass

    waiting, computing = BatchLoader(Made(wait), range(4), workers), BatchLoader(Made(compute), range(4), workers)
    take(waiting, 4)
    take(computing, 4)
    shares = waiting.dataset.board.shares()
    assert shares["disk"] > 0.6 and shares["cpu"] < 0.2
    shares = computing.dataset.board.shares()
    assert shares["disk"] < 0.3 and shares["cpu"] + shares["queue"] > 0.7  # other processes may hold the cores
    assert computing.dataset.board.shares() == {"cpu": 0.0, "queue": 0.0, "disk": 0.0}  # since the last call


def advice(workers: int, waited: float, cores: int, seconds: tuple[float, float, float]) -> str:
    loader = BatchLoader(Made(None), [], workers)
    loader.dataset.board.seconds[0] = torch.tensor(seconds)
    return waiting_advice(loader, waited, cores)


BUSY = (10.0, 8.0, 1.0)  # of 10 s: 8 on a core, 1 waiting for one, so 1 for the disk


@pytest.mark.parametrize(
    ("workers", "waited", "cores", "seconds", "said"),
    [
        # two workers feed 62 % of the time, so 2 / 0.62 = 3.2 would feed all of it
        (
            2,
            0.38,
            8,
            BUSY,
            "waits for data 38 % of the time: raise DATALOADER.NUM_WORKERS from 2 to 4 (loading is 80 %",
        ),
        (0, 0.38, 8, BUSY, "from 0 to 1"),  # loading takes 0.38 / 0.62 of a step
        (0, 0.75, 8, BUSY, "from 0 to 3"),
        (4, 0.9, 8, BUSY, "from 4 to 7"),  # of 8 cores one is for training
        (7, 0.5, 8, BUSY, "7 workers already take the 8 cores of this process: store the images no larger"),
        (7, 0.5, 8, (10.0, 1.0, 1.0), "80 % waiting for the disk, 10 % waiting for a core; 7 workers are enough"),
        (7, 0.5, 8, (10.0, 2.0, 7.0), "70 % waiting for a core; other processes take the 8 cores: stop them"),
        (1, 0.5, 1, (10.0, 1.0, 1.0), "copy the images to a faster disk"),
    ],
)
def test_slow_data_gets_advice_with_a_number(workers, waited, cores, seconds, said):
    assert said in advice(workers, waited, cores, seconds)


def test_cores_are_shared_by_the_processes_of_a_machine():
    assert usable_cores() >= usable_cores(2) >= 1
    assert usable_cores(10_000) == 1


@pytest.mark.parametrize(("accumulate", "world_size"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_a_step_read_again_equals_what_every_rank_got(dataset, accumulate, world_size):
    cfg = config(SOLVER__ACCUMULATE=accumulate)
    loaders = [build_train_loader(cfg, dataset, 0, rank, world_size) for rank in range(world_size)]
    expected = [take(loader, 6 * accumulate)[5 * accumulate :] for loader in loaders]
    started_later = build_train_loader(cfg, dataset, 3 * accumulate, 0, world_size)
    again = read_step(started_later, 5)
    assert [len(batches) for batches in again] == [accumulate] * world_size
    for ours, theirs in zip(again, expected, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert one.image_ids == other.image_ids
            assert torch.equal(one.images, other.images) and torch.equal(one.gt_boxes, other.gt_boxes)
    ids = again[0][0].image_ids
    assert files_of(started_later, ids) == [str(dataset.images_dir / f"{image_id - 100}.png") for image_id in ids]


def test_workers_of_an_iterator_that_the_garbage_collector_finds_end_at_once(dataset):
    gc.collect()
    iterator = iter(build_train_loader(config(DATALOADER__NUM_WORKERS=2), dataset))
    next(iterator)
    workers = multiprocessing.active_children()
    cycle = [iterator]
    cycle.append(cycle)
    del iterator, cycle
    start = time.monotonic()
    gc.collect()
    for worker in workers:
        worker.join(timeout=4)
    assert len(workers) >= 2 and not any(worker.is_alive() for worker in workers)
    assert time.monotonic() - start < 4  # torch alone: 5 s for each worker, which then stays


def test_workers_ignore_a_signal_to_the_whole_group_while_they_are_needed(dataset):
    iterator = iter(build_train_loader(config(DATALOADER__NUM_WORKERS=1), dataset))
    next(iterator)
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGTERM)
    assert len(take(iterator, 4)) == 4
    iterator.close()


def program(dataset, folder, code: str) -> subprocess.CompletedProcess:
    """Run `code` in a program of its own that has a `loader` with two workers; `folder` is its temporary folder."""
    start = (
        "import os, signal, sys, time\n"
        "from loader_cases import config\n"
        "from retinanet.data import workers\n"
        "from retinanet.data.coco import CocoDataset\n"
        "from retinanet.data.loader import build_train_loader\n"
        "loader = build_train_loader(config(DATALOADER__NUM_WORKERS=2), CocoDataset(sys.argv[1], sys.argv[2]))\n"
    )
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    options = ["-W", "ignore:This DataLoader will create", "-c", start + code]  # torch, where there are fewer cores
    command = [sys.executable, *options, str(dataset.file(0).parent), str(dataset.annotations_file)]
    environment = {**os.environ, "PYTHONPATH": paths, "TMPDIR": str(folder)}
    return subprocess.run(command, env=environment, timeout=120, capture_output=True, text=True)


def test_workers_whose_program_is_killed_before_they_have_started_end(dataset, tmp_path):
    code = (
        "start = workers._start_worker\n"
        "def late(worker):\n"
        "    open(os.path.join(os.environ['TMPDIR'], f'worker{os.getpid()}'), 'w').close()\n"
        "    while os.getppid() == parent:\n"
        "        time.sleep(0.01)\n"
        "    start(worker)\n"
        "parent = os.getpid()\n"
        "loader.worker_init_fn = late\n"
        "signal.signal(signal.SIGALRM, lambda *_: os.kill(parent, signal.SIGKILL))\n"
        "signal.setitimer(signal.ITIMER_REAL, 1, 0.1)\n"
        "next(iter(loader))\n"
    )
    assert program(dataset, tmp_path, code).returncode == -signal.SIGKILL
    workers = [int(name.removeprefix("worker")) for name in os.listdir(tmp_path) if name.startswith("worker")]
    deadline = time.monotonic() + 20
    while workers and time.monotonic() < deadline:
        time.sleep(0.05)
        workers = [pid for pid in workers if os.path.exists(f"/proc/{pid}")]
    assert not workers


def test_workers_that_are_ended_at_any_moment_leave_no_lock_behind(dataset, tmp_path):
    code = (  # an event of multiprocessing would be locked most of the time
        "from multiprocessing.synchronize import Condition\n"
        "leave = Condition.__exit__\n"
        "def late(*given):\n"
        "    time.sleep(0.05)\n"
        "    return leave(*given)\n"
        "Condition.__exit__ = late\n"
        "for _ in range(4):\n"
        "    next(iter(loader))\n"
    )
    assert program(dataset, tmp_path, code).returncode == 0


def test_a_program_that_ends_in_the_middle_of_a_loader_ends_and_leaves_no_file(dataset, tmp_path):
    code = "for _ in range(2):\n    kept = iter(loader)\n    next(kept)\nsys.modules['kept'] = kept\n"
    ended = program(dataset, tmp_path, code)
    assert ended.returncode == 0 and ended.stderr == "", ended.stderr
    assert os.listdir(tmp_path) == []
