"""What a run tells while it goes on: a bar with the time left, lines of metrics, the share of time spent on waiting.

Values of a step stay on the device until they are written, every `LOG_PERIOD` iterations: reading them waits for it.
"""

import contextlib
import logging
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from retinanet.engine.failure import LEAST_LOSS_SCALE, NonFiniteError
from retinanet.structures import Batch
from retinanet.utils import distributed
from retinanet.utils.log import MetricsWriter

_log = logging.getLogger(__name__)
SLOW_DATA = 0.2  # share of the time spent on waiting for data above which the log says what to change


class Progress:
    """Collects the values of steps, and writes their means over the iterations since the last line.

    window: values of the finished iterations that no line covers yet; a checkpoint stores it, so that the lines of a
        resumed run equal those of a run that was not interrupted.
    skips_overflow: under loss scaling a gradient that overflows is skipped by design and is no error.
    advise: the share of time spent on waiting for data -> what to do about it.
    """

    def __init__(
        self,
        writer: MetricsWriter | None,
        max_iter: int,
        device: torch.device,
        iteration: int = 0,
        window: list[dict] | None = None,
        skips_overflow: bool = False,
        advise: Callable[[float], str] = lambda share: f"training waits for data {100 * share:.0f} % of the time",
    ):
        self.writer = writer
        self.device = device
        self.window = list(window or [])
        self._skips_overflow, self._advise = skips_overflow, advise
        self._starting, self._slow_lines = True, 0
        self._pending: list[tuple[int, float, list[int], dict[str, Tensor]]] = []
        self._held: list[tuple[int, dict]] | None = None
        self._bar = tqdm(total=max_iter, initial=iteration, unit="it", disable=not distributed.is_main(), mininterval=2)
        self.restart_clock()

    @property
    def lines(self) -> int:
        """Lines of metrics.jsonl so far; a checkpoint stores it, so that a resume knows which lines run again."""
        return self.writer.lines if self.writer is not None else 0

    def restart_clock(self) -> None:
        """Start timing anew, so that an evaluation does not count as slow training."""
        self._start, self._waited, self._images = time.perf_counter(), 0.0, 0

    @contextlib.contextmanager
    def waiting_for_data(self):
        """Count the time inside the block as waiting for the loader."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def add(self, iteration: int, lr: float, batches: list[Batch], values: dict[str, Tensor]) -> None:
        """Take the 0-d tensors of one finished step. On the CPU they are checked at once, on a GPU by `flush`."""
        self._images += sum(map(len, batches)) * distributed.world_size()
        self._pending.append((iteration, lr, [i for batch in batches for i in batch.image_ids], values))
        self._bar.update()
        if self.device.type == "cpu":
            self.flush()

    def flush(self) -> None:
        """Move the pending values to the host (waits for the device once); raises `NonFiniteError`."""
        if not self._pending:
            return
        names = list(self._pending[0][3])
        columns = [torch.stack([values[name].float() for name in names]) for *_, values in self._pending]
        for (iteration, lr, image_ids, _), row in zip(self._pending, torch.stack(columns).tolist(), strict=True):
            values = dict(zip(names, row, strict=True))
            self._check(iteration, lr, image_ids, values)
            self.window.append(values)
        self._pending.clear()

    def _check(self, iteration: int, lr: float, image_ids: list[int], values: dict[str, float]) -> None:
        checked = ["loss"] if self._skips_overflow else ["loss", "grad_norm"]
        wrong = ""
        if not all(math.isfinite(values[name]) for name in checked):
            wrong = "a loss or the gradient is not finite"
        elif values.get("loss_scale", LEAST_LOSS_SCALE) < LEAST_LOSS_SCALE:
            wrong = "the gradient overflows float16 step after step, whatever the loss scale"
        if not wrong:
            return
        shown = ", ".join(f"{name} {value:g}" for name, value in values.items())
        raise NonFiniteError(
            f"iteration {iteration}: {wrong} ({shown}, lr {lr:g}); image ids {image_ids}. "
            "That step was not applied. Lower SOLVER.BASE_LR, lengthen SOLVER.WARMUP_ITERS, set "
            f"SOLVER.CLIP_GRAD_NORM{self._overflow_advice()}, or look at these images and their boxes",
            iteration,
            lr,
            values,
        )

    def _overflow_advice(self) -> str:
        return ", use SOLVER.AMP bf16 or off" if self._skips_overflow else ""

    def write_line(self, iteration: int, lr: float) -> None:
        """Write the means over the window, the speed and the share of waiting; then the window is empty."""
        self.flush()
        means, skipped = self._means()
        elapsed = max(time.perf_counter() - self._start, 1e-9)
        speed = {"images_per_s": self._images / elapsed, "data_wait": self._waited / elapsed}
        line = {"lr": lr, **means, **skipped, **speed}
        if self.device.type == "cuda":
            line["memory"] = torch.cuda.max_memory_allocated(self.device) / 2**20
        self.window.clear()
        self.restart_clock()
        if self.writer is None:
            return
        if self._held is None:
            self.writer.write(iteration, line)
        else:
            self._held.append((iteration, line))
        self._bar.set_postfix_str(f"loss {means['loss']:.3f}")
        _log.info(
            "iteration %d  loss %.4f %s  lr %.3g  grad norm %.3g  %.1f images/s  data wait %.0f %%",
            iteration,
            means["loss"],
            _parts(means),
            lr,
            means.get("grad_norm", math.nan),
            line["images_per_s"],
            100 * line["data_wait"],
        )
        if skipped:
            _log.info(
                "the gradient overflowed float16 in %d of these iterations, which were not applied; loss scale %g",
                skipped["skipped"],
                line["loss_scale"],
            )
        self._tell_slow_data(line["data_wait"])

    def _tell_slow_data(self, share: float) -> None:
        """Log what to do about slow data, at the first slow line and then at ever fewer: the 2nd, 4th, 8th, ...

        The first line of a run is left out: its waiting includes the start of the workers.
        """
        advice = self._advise(share)
        if share > SLOW_DATA and not self._starting:
            self._slow_lines += 1
            if self._slow_lines & (self._slow_lines - 1) == 0:
                _log.info("%s", advice)
        self._starting = False

    def _means(self) -> tuple[dict[str, float], dict[str, int]]:
        """Return the means over the window, and {"skipped": how many} when gradients of it overflowed.

        Those gradients are in no mean; the loss scale is the last one, since it changes by powers of two.
        """
        columns = {name: [values[name] for values in self.window] for name in self.window[0]}
        finite = {name: [value for value in column if math.isfinite(value)] for name, column in columns.items()}
        means = {name: sum(column) / len(column) for name, column in finite.items() if column}
        if "loss_scale" in columns:
            means["loss_scale"] = columns["loss_scale"][-1]
        skipped = len(self.window) - len(finite["grad_norm"])
        return means, {"skipped": skipped} if skipped else {}

    def write_metrics(self, iteration: int, metrics: dict) -> None:
        """Write the single numbers of an evaluation as a line of their own; nested tables stay in metrics.json."""
        if self.writer is not None:
            self.writer.write(iteration, {k: v for k, v in metrics.items() if isinstance(v, (int, float))})

    def hold(self) -> None:
        """Keep the lines of steps from now on in memory until `release`: an earlier evaluation's line is to come."""
        self._held = []

    def release(self) -> None:
        """Write the lines that were kept, and later ones at once."""
        held, self._held = self._held or [], None
        for iteration, line in held if self.writer is not None else ():
            self.writer.write(iteration, line)

    def close(self) -> None:
        self._bar.close()
        if self.writer is not None:
            self.writer.close()


def _parts(means: dict[str, float]) -> str:
    """Return what stands behind the loss: its parts in detection, the accuracy in classification."""
    if "loss_cls" in means:
        return f"(class {means['loss_cls']:.4f}, box {means['loss_box']:.4f})"
    return f"(top-1 {means['top1']:.1f} %)"
