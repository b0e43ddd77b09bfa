"""Out of memory is recognised whoever reports it, and the message says what the step held and which keys to lower."""

import pytest
import torch
from step_cases import GN, new_batch, new_trainer

from retinanet.engine.out_of_memory import explained_evaluation, explained_step
from retinanet.utils import memory
from retinanet.utils.memory import OutOfMemory, is_out_of_memory

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ..."), True),
        (MemoryError(), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("The size of tensor a (3) must match"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_only_errors_about_memory_are_taken_for_that(error, expected):
    assert is_out_of_memory(error) == expected


def test_a_step_that_does_not_fit_says_what_it_held_and_what_to_lower():
    batches = [new_batch(4), new_batch(4, boxes=5)]
    with pytest.raises(OutOfMemory) as caught, explained_step(batches, 7, "off", CPU):
        torch.empty(2**60, dtype=torch.uint8)
    message = str(caught.value)
    assert "iteration 7: out of memory on cpu (" in message and f"{2**60}" in message
    assert "4 images of 64 x 64 pixels, up to 5 boxes (image id 0), image ids [0, 1, 2, 3]" in message
    # 2 x 4 images a step: 4 x 2 are as many
    assert "SOLVER.IMS_PER_BATCH from 4 to 2 with SOLVER.ACCUMULATE 4 (the same images per step)" in message
    assert "SOLVER.AMP bf16" in message and "--dry-run" in message
    assert "\n" not in message


def test_one_image_is_not_halved_and_reduced_precision_not_proposed_twice():
    with pytest.raises(OutOfMemory) as caught, explained_step([new_batch(1)], 1, "bf16", CPU):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")
    assert "(Tried to allocate 2.00 GiB)" in str(caught.value)
    assert "IMS_PER_BATCH from" not in str(caught.value) and "AMP" not in str(caught.value)


def test_an_evaluation_names_its_own_keys_and_other_errors_pass():
    with pytest.raises(OutOfMemory, match="TEST.IMS_PER_BATCH"), explained_evaluation(CPU):
        raise MemoryError
    with pytest.raises(RuntimeError, match="shapes"), explained_evaluation(CPU):
        raise RuntimeError("shapes")
    with pytest.raises(RuntimeError, match="shapes"), explained_step([new_batch(1)], 1, "off", CPU):
        raise RuntimeError("shapes")


def test_the_peak_counts_what_was_taken_since_it_was_restarted():
    block = torch.ones(2**26)  # 256 MiB
    del block
    memory.restart_peak(CPU)
    before = memory.peak(CPU)
    block = torch.ones(2**25)  # 128 MiB
    assert memory.peak(CPU) - before == pytest.approx(block.nbytes, rel=0.25)
    assert 0 < memory.available(CPU) < 2**50
    assert memory.gib(3 * 2**29) == "1.50 GiB"


def test_a_container_has_no_more_memory_than_its_limit(tmp_path, monkeypatch):
    free = memory.available(CPU)
    monkeypatch.setattr(memory, "_GROUP", tmp_path)
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 500000\ninactive_file 200000\n")
    assert memory.available(CPU) == 500_000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available(CPU) == pytest.approx(free, rel=0.5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_that_is_full_is_explained():
    trainer = new_trainer(*GN)
    device = next(trainer.model.cuda().parameters()).device
    with pytest.raises(OutOfMemory, match="out of memory on cuda"), explained_step([new_batch(2)], 1, "off", device):
        torch.empty(2**50, dtype=torch.uint8, device=device)
