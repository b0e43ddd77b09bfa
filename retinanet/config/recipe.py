"""The batch recipe: learning rate and schedule follow from the number of images per optimizer step.

One rule, linear scaling (Goyal et al., arXiv 1706.02677, section 2.1; Detectron's GETTING_STARTED.md does the same by
hand): with r = images per step / `SOLVER.REFERENCE_BATCH`, the rate is multiplied by r and every count of iterations
is divided by r, so that a run sees as many images as the reference does. The warm-up (section 2.2 there) is divided
too: it stays the same share of the run.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Recipe:
    """What training uses in place of the `SOLVER` and `TEST` keys of the same names; counts in optimizer steps.

    `reasons` are the lines for the log.
    """

    base_lr: float
    max_iter: int
    steps: tuple[int, ...]
    warmup_iters: int
    eval_period: int
    checkpoint_period: int
    reasons: tuple[str, ...] = ()


def batch_recipe(cfg) -> Recipe:
    """Return the rate and the schedule for `IMS_PER_BATCH` x `ACCUMULATE` images per step; counts stay at least 1.

    `REFERENCE_BATCH` 0 keeps every key as it is written; a count of 0 stays 0.
    """
    solver = cfg.SOLVER
    written = Recipe(
        base_lr=solver.BASE_LR,
        max_iter=solver.MAX_ITER,
        steps=tuple(solver.STEPS),
        warmup_iters=solver.WARMUP_ITERS,
        eval_period=cfg.TEST.EVAL_PERIOD,
        checkpoint_period=solver.CHECKPOINT_PERIOD,
    )
    batch, reference = solver.IMS_PER_BATCH * solver.ACCUMULATE, solver.REFERENCE_BATCH
    if not reference:
        return replace(written, reasons=("batch recipe: off (SOLVER.REFERENCE_BATCH is 0), every key as written",))
    if batch == reference:
        return replace(written, reasons=(f"batch recipe: {batch} images per step, as the keys are stated for",))
    scaled = _scale(written, batch / reference)
    head = (
        f"batch recipe: {batch} images per step (IMS_PER_BATCH {solver.IMS_PER_BATCH} x ACCUMULATE "
        f"{solver.ACCUMULATE}), keys stated for REFERENCE_BATCH {reference}: rate x {batch / reference:g}, iterations "
        f"/ {batch / reference:g} (linear scaling, arXiv 1706.02677; SOLVER.REFERENCE_BATCH 0 switches it off)"
    )
    return replace(scaled, reasons=(head, *_changes(written, scaled)))


def _scale(recipe: Recipe, ratio: float) -> Recipe:
    def count(iterations: int) -> int:
        return max(1, round(iterations / ratio)) if iterations else 0

    return Recipe(
        base_lr=recipe.base_lr * ratio,
        max_iter=count(recipe.max_iter),
        steps=tuple(count(step) for step in recipe.steps),
        warmup_iters=count(recipe.warmup_iters),
        eval_period=count(recipe.eval_period),
        checkpoint_period=count(recipe.checkpoint_period),
    )


def _changes(before: Recipe, after: Recipe) -> list[str]:
    """Return one line for each value that the rule has changed."""
    names = {
        "base_lr": "SOLVER.BASE_LR",
        "max_iter": "SOLVER.MAX_ITER",
        "steps": "SOLVER.STEPS",
        "warmup_iters": "SOLVER.WARMUP_ITERS",
        "eval_period": "TEST.EVAL_PERIOD",
        "checkpoint_period": "SOLVER.CHECKPOINT_PERIOD",
    }
    lines = []
    for field, key in names.items():
        old, new = getattr(before, field), getattr(after, field)
        if old != new:
            old, new = (f"{value:g}" if isinstance(value, float) else f"{value}" for value in (old, new))
            lines.append(f"batch recipe: {key} {old} -> {new}")
    return lines
