"""Lines of metrics are means over the window, survive a resume, and name what was not finite."""

import json

import pytest
import torch

from retinanet.engine.progress import NonFiniteError, Progress
from retinanet.structures import Batch
from retinanet.utils.log import MetricsWriter


def batch(image_ids: list[int]) -> Batch:
    count = len(image_ids)
    sizes = torch.zeros(count, 2, dtype=torch.int64)
    boxes, labels = torch.zeros(count, 8, 4), torch.zeros(count, 8, dtype=torch.int64)
    return Batch(torch.zeros(count, 3, 4, 4), sizes, sizes, torch.ones(count, 2), boxes, labels, image_ids)


def values(loss: float, grad_norm: float = 1.0) -> dict:
    named = {"loss": loss, "loss_cls": loss / 2, "loss_box": loss / 2, "grad_norm": grad_norm, "num_fg": 3}
    return {name: torch.tensor(value) for name, value in named.items()}


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_line_holds_the_mean_over_its_window(tmp_path):
    progress = Progress(MetricsWriter(tmp_path, tensorboard=False), 4, torch.device("cpu"))
    for iteration, loss in enumerate((1.0, 3.0, 5.0, 5.0), start=1):
        progress.add(iteration, 0.1, [batch([1, 2]), batch([3])], values(loss))
        if iteration % 2 == 0:
            progress.write_line(iteration, 0.1)
    progress.close()
    assert [(line["iteration"], line["loss"], line["loss_cls"]) for line in lines(tmp_path)] == [(2, 2, 1), (4, 5, 2.5)]
    assert {"lr", "loss_box", "images_per_s", "data_wait", "grad_norm"} <= set(lines(tmp_path)[0])


def test_a_window_taken_over_from_a_checkpoint_counts(tmp_path):
    first = Progress(None, 4, torch.device("cpu"))
    first.add(1, 0.1, [batch([1])], values(1.0))
    second = Progress(MetricsWriter(tmp_path, tensorboard=False), 4, torch.device("cpu"), 1, first.window)
    second.add(2, 0.1, [batch([1])], values(2.0))
    second.write_line(2, 0.1)
    assert lines(tmp_path)[0]["loss"] == 1.5


@pytest.mark.parametrize(("loss", "norm"), [(float("nan"), 1.0), (float("inf"), 1.0), (1.0, float("nan"))])
def test_what_is_not_finite_stops_with_images_values_and_rate(loss, norm):
    progress = Progress(None, 4, torch.device("cpu"))
    with pytest.raises(NonFiniteError, match=r"iteration 7: .*lr 0.25\); image ids \[11, 12\]"):
        progress.add(7, 0.25, [batch([11]), batch([12])], values(loss, norm))


def test_loss_scaling_may_overflow_gradients_but_not_the_loss():
    progress = Progress(None, 4, torch.device("cpu"), skips_overflow=True)
    progress.add(1, 0.1, [batch([1])], values(1.0, float("inf")))
    with pytest.raises(NonFiniteError):
        progress.add(2, 0.1, [batch([1])], values(float("nan"), 1.0))
