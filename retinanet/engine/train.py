"""The training step and the loop around it; nothing is hidden behind either.

One iteration is one optimizer step. It takes `ACCUMULATE` micro-batches from the loader; the anchors of all of them
are assigned first, so that one normalizer serves the whole step and micro-batches add up to the big batch.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.swa_utils import AveragedModel

from retinanet.engine.checkpoint import Checkpointer
from retinanet.engine.evaluate import autocast
from retinanet.engine.failure import StepGuard
from retinanet.engine.optim import Schedule, clip_gradients, set_lr, settle_loaded
from retinanet.engine.out_of_memory import explained_evaluation, explained_step
from retinanet.engine.pending import Pending
from retinanet.engine.process_state import (
    averaged_statistics,
    gather_processes,
    of_this_process,
    own_buffers,
    random_state,
    set_random_state,
    without_repeats,
)
from retinanet.engine.progress import Progress
from retinanet.engine.scoring import PendingEvaluation
from retinanet.layers.norm import set_loss_scale
from retinanet.modeling.loss import RetinaNetLoss
from retinanet.modeling.retinanet import RetinaNet
from retinanet.structures import Batch
from retinanet.utils import distributed


@dataclass
class Trainer:
    """What a step changes. `net` is what is called on images: `model` itself, or its parallel or compiled form.

    step: what the loop calls instead of `train_step`, such as the same step as a CUDA graph (`graphs.py`).
    evaluation_due: the evaluation after `iteration` steps is still to be done. best: `score` and "iteration" of
    `best.pth`. score: the metric that it follows.
    """

    model: RetinaNet
    net: nn.Module
    loss: RetinaNetLoss
    optimizer: SGD
    amp: str = "off"
    clip_grad_norm: float = 0.0
    scaler: torch.amp.GradScaler | None = None
    ema: AveragedModel | None = None
    iteration: int = 0
    evaluation_due: bool = False
    score: str = "AP"
    best: dict = field(default_factory=dict)
    step: Callable[[list[Batch]], dict[str, Tensor]] | None = None

    def __post_init__(self):
        self.guard = StepGuard(self.model, self.loss)

    def state(self) -> dict:
        """Return everything that a resume needs, as plain containers and tensors."""
        return {
            "model": self.model.state_dict(),
            "iteration": self.iteration,
            "optimizer": self.optimizer.state_dict(),
            "loss": self.loss.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler else {},
            "ema": self.ema.state_dict() if self.ema else {},
            "random": random_state(),
            "evaluation_due": self.evaluation_due,
            "best": self.best,
        }

    def process_state(self) -> dict:
        """Return the part of `state()` that other processes of the job have otherwise, copied to the CPU."""
        ema = own_buffers(self.ema) if self.ema else {}
        return {"model": own_buffers(self.model), "ema": ema, "random": random_state()}

    def models(self) -> list[nn.Module]:
        """Return the model and, where there is one, its moving average."""
        return [self.model, self.ema.module] if self.ema else [self.model]

    def load_state(self, state: dict) -> None:
        """Continue from the `state()` of a checkpoint of the same model, and this process's own part of it."""
        state = of_this_process(state)
        self.model.load_state_dict(state["model"])
        groups = self.optimizer.param_groups
        options = [{key: value for key, value in group.items() if key not in ("params", "lr")} for group in groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, own in zip(self.optimizer.param_groups, options, strict=True):
            group.update(own)  # weight decay and momentum are the configuration's, which may have changed
        settle_loaded(self.optimizer)
        self.loss.load_state_dict(state["loss"])
        if self.scaler and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        if self.ema:
            # a run that switches averaging on when it resumes starts from the weights of that moment
            self.ema.load_state_dict(state["ema"]) if state["ema"] else self.ema.module.load_state_dict(state["model"])
        set_random_state(state["random"])
        self.iteration, self.best = state["iteration"], state["best"]
        self.evaluation_due = state.get("evaluation_due", False)

    def evaluated_model(self) -> RetinaNet:
        """Return the model that evaluation and `best.pth` use: the averaged one where there is one."""
        return self.ema.module if self.ema else self.model


def train_step(trainer: Trainer, batches: list[Batch]) -> dict[str, Tensor]:
    """Change the weights once and return the 0-d tensors loss, loss_cls, loss_box, grad_norm and num_fg.

    batches: the micro-batches of this process, on the device of the model. The values are those of the whole batch, of
    all micro-batches and processes; reading them waits for the device, computing them does not. When a loss or the
    gradient norm is not finite the optimizer leaves the weights as they are, in this step and, until
    `trainer.guard.clear()`, in all later ones. With a loss scaler there is a sixth value, its loss_scale, and a
    gradient that overflows skips its own step alone.
    """
    model, loss_fn = trainer.model, trainer.loss
    device = batches[0].images.device
    trainer.guard.begin()
    assigned = []
    for batch in batches:
        anchors = model.anchors(tuple(batch.images.shape[-2:]), device)
        assigned.append(loss_fn.assign(anchors, batch.gt_boxes, batch.gt_labels))
    num_fg = torch.cat([assignment.num_fg for assignment in assigned])
    # DDP averages gradients over the processes, so each of them divides by its share of the global normalizer
    divisor = loss_fn.divisor(distributed.all_reduce_sum(loss_fn.count(num_fg))) / distributed.world_size()
    loss_scale = None
    if trainer.scaler:  # a norm that stores gradients (MABN) stores them unscaled; `scale` gives the factor unread
        loss_scale = trainer.scaler.scale(torch.ones((), device=device))
        set_loss_scale(model, loss_scale)
    totals = {"loss_cls": 0.0, "loss_box": 0.0}
    for index, (batch, assignment) in enumerate(zip(batches, assigned, strict=True)):
        with distributed.no_gradient_sync(trainer.net, index + 1 < len(batches)):
            with autocast(device, trainer.amp):
                outputs = trainer.net(model.normalize(batch.images, batch.image_sizes))
            losses = loss_fn(outputs, batch.gt_boxes, batch.gt_labels, assignment, divisor)
            total = losses["loss_cls"] + losses["loss_box"]
            (trainer.scaler.scale(total * trainer.guard.factor(total)) if trainer.scaler else total).backward()
        totals = {name: value + losses[name].detach() for name, value in totals.items()}
    reported = distributed.all_reduce_mean(torch.stack([totals["loss_cls"], totals["loss_box"], num_fg.sum().float()]))
    loss = reported[:2].sum()
    grad_norm = apply_gradients(trainer, loss, loss_scale)
    values = {
        "loss": loss,
        "loss_cls": reported[0],
        "loss_box": reported[1],
        "grad_norm": grad_norm,
        "num_fg": reported[2] * distributed.world_size(),
    }
    return values if loss_scale is None else {**values, "loss_scale": loss_scale}


def apply_gradients(trainer: Trainer, loss: Tensor, loss_scale: Tensor | None) -> Tensor:
    """Clip, step, clear; return the gradient norm before clipping. A non-finite value skips the step on the device."""
    optimizer, scaler = trainer.optimizer, trainer.scaler
    if scaler:
        scaler.unscale_(optimizer)
    grad_norm = clip_gradients(optimizer, trainer.clip_grad_norm)
    trainer.guard.note(loss, grad_norm, loss_scale)
    if scaler:
        scaler.step(optimizer)
        scaler.update()
    else:
        # fused SGD reads this flag inside its kernel, so skipping costs no synchronisation
        optimizer.found_inf = trainer.guard.failed.float()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if trainer.ema:
        trainer.ema.update_parameters(trainer.model)
    return grad_norm.detach()


@dataclass(frozen=True)
class Periods:
    """When the loop does what, in iterations; 0 is never. Training always ends with all three."""

    log: int
    evaluate: int
    checkpoint: int


def train(
    trainer: Trainer,
    loader: Iterator[Batch],
    schedule: Schedule,
    periods: Periods,
    accumulate: int,
    device: torch.device,
    progress: Progress,
    checkpointer: Checkpointer,
    evaluate: Callable[[RetinaNet, int], dict | PendingEvaluation | None],
    describe: dict,
    stop: Callable[[], bool] = lambda: False,
    step: Callable[[Trainer, list], dict[str, Tensor]] = train_step,
) -> bool:
    """Run from `trainer.iteration` to `schedule.max_iter`; return False when `stop()` ended it early, after saving.

    loader: yields this process's micro-batches, starting with the one that follows `trainer.iteration`.
    evaluate: gets the model and the iteration, returns metrics, what waits for them while training goes on, or None
        where it was stopped; `best.pth` follows their `trainer.score`.
    step: what one iteration does, as `train_step`.
    describe: "config", "classes" and "provenance", stored in every checkpoint.
    Raises `NonFiniteError` (`failure.py`), where the step that it names has not changed the weights, and `OutOfMemory`.
    """
    trainer.model.train()
    record = partial(_record, trainer, checkpointer, progress, describe)
    with Pending(progress, record) as pending:
        while True:
            if trainer.evaluation_due:  # also the one that an interrupted run left to this one
                finished = _evaluate(trainer, evaluate, progress, record, pending)
                last = trainer.iteration >= schedule.max_iter
                if last:
                    pending.settle()
                # while scores are to come, the checkpoint before the evaluation stands: a resume evaluates again
                if not pending and (last or not finished or _due(periods.checkpoint, trainer.iteration)):
                    _save(trainer, checkpointer, progress, describe)
                if not finished:
                    return False
            if trainer.iteration >= schedule.max_iter:
                return True
            lr = schedule.lr(trainer.iteration)
            with progress.waiting_for_data():
                batches = [next(loader) for _ in range(accumulate)]
            set_lr(trainer.optimizer, lr)
            with explained_step(batches, trainer.iteration + 1, trainer.amp, device):
                batches = [batch.to(device) for batch in batches]
                values = step(trainer, batches) if trainer.step is None else trainer.step(batches)
            trainer.iteration += 1

            iteration, last = trainer.iteration, trainer.iteration == schedule.max_iter
            progress.add(iteration, lr, batches, values)
            trainer.evaluation_due = last or _due(periods.evaluate, iteration)
            stopping = distributed.any_process(stop(), iteration, device)
            saving = last or stopping or _due(periods.checkpoint, iteration)
            pending.settle(wait=saving or trainer.evaluation_due)
            if last or _due(periods.log, iteration):
                progress.write_line(iteration, lr)
            if saving:  # before the evaluation, which may take long
                _save(trainer, checkpointer, progress, describe)
            if stopping:
                return False


def _due(period: int, iteration: int) -> bool:
    return period > 0 and iteration % period == 0


def _evaluate(trainer: Trainer, evaluate, progress: Progress, record, pending: Pending) -> bool:
    """Evaluate, and record the metrics or leave that to `pending`.

    Return False when the evaluation was stopped; it is still due then.
    """
    progress.flush()
    with averaged_statistics(trainer.models()):
        model = trainer.evaluated_model()
        with explained_evaluation(next(model.parameters()).device):
            found = evaluate(model, trainer.iteration)
        if isinstance(found, PendingEvaluation):
            weights = {name: value.to("cpu", copy=True) for name, value in model.state_dict().items()}
            pending.start(trainer.iteration, found, weights)
        elif found is not None:
            record(trainer.iteration, found, model.state_dict())
    trainer.model.train()
    progress.restart_clock()
    trainer.evaluation_due = found is None
    return found is not None


def _record(
    trainer: Trainer, checkpointer: Checkpointer, progress: Progress, describe: dict, iteration: int, metrics, weights
) -> None:
    """Write the metrics, and keep the weights as `best.pth` when their score is the highest."""
    if not (distributed.is_main() and metrics):
        return
    progress.write_metrics(iteration, metrics)
    score = metrics.get(trainer.score) or 0.0
    if score > trainer.best.get(trainer.score, -1.0):
        trainer.best = {trainer.score: score, "iteration": iteration}
        checkpointer.save_best({"model": weights, "iteration": iteration, "metrics": metrics, **describe})


def _save(trainer: Trainer, checkpointer: Checkpointer, progress: Progress, describe: dict) -> None:
    """Write a checkpoint from the first process; the others wait until it is on the disk."""
    progress.flush()
    processes = gather_processes(trainer.process_state())
    with averaged_statistics(trainer.models()):
        if distributed.is_main():
            state = trainer.state()
            own = {"processes": without_repeats(processes, state)}
            log = {"log_window": progress.window, "log_lines": progress.lines}
            checkpointer.save({**state, **own, **log, **describe})
    distributed.barrier()
