"""EstBN, batch normalization by running estimates: the batch half of BCN for micro-batches (arXiv 1911.09738).

Source: joe-siyuan-qiao/Batch-Channel-Normalization. In training the estimates move first and then normalize, as
constants for the gradient; evaluation uses them as they are:

    running_mean <- running_mean + rate * (mean(x) - running_mean)
    running_var  <- running_var + rate * (mean((x - OLD running_mean)^2) - running_var)
    y = weight * (x - running_mean) / sqrt(running_var + 1e-5) + bias

The rate. The authors keep it in the buffer `estbn_moving_speed`, which starts at 0, and no code that they released
ever sets it: their layer, used as it is, never moves and is a plain affine map. The schedule here is ours:

    rate of step t = max(1 / t, update_rate * min(1, decay_iters / t))         t = 1, 2, ... in num_batches_tracked

1 / t is the plain average of all batches so far, which leaves nothing of the start value in the estimates; a fixed
0.01 would still give the start 37 % of the weight after 100 steps. It ends after 1 / update_rate steps (100), when the
average begins to forget what older weights of the network produced. decay_iters, off by default, lets the average grow
again in proportion to t once t has passed it: for the end of a run, when small learning rates hardly move the weights.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retinanet.errors import UserError
from retinanet.layers.norm.reduce import image_moments, wide

EPS = 1e-5  # inside the root; fixed in the authors' layer, apart from the eps of the channel half


class EstBN(nn.BatchNorm2d):
    """y = weight * (x - running_mean) / sqrt(running_var + 1e-5) + bias, in training mode with estimates moved first.

    State as `torch.nn.BatchNorm2d`, with (C,) vectors, and `estbn_moving_speed` (1,), the rate of the last step.
    update_rate: weight of a new batch, in (0, 1], else `UserError`; None leaves the rate to whoever writes the buffer,
    as in the authors' layer, and does not count steps. decay_iters: see the module docstring; 0 is off.
    variance: "official" is about the old running mean, as above; "batch" is the biased variance of the batch (labml).

    An empty or non-finite batch moves nothing. A checkpoint with estimates but no step count (the authors never count)
    goes on at `update_rate`, so that its estimates are not averaged away.
    """

    has_statistics = True
    folds_in_training = False
    conv_kind = "standardized"

    def __init__(
        self,
        channels: int,
        update_rate: float | None = 0.01,
        decay_iters: int = 0,
        variance: str = "official",
    ):
        super().__init__(channels, eps=EPS)
        _check_options(update_rate, decay_iters, variance)
        self.update_rate, self.decay_iters, self.variance = update_rate, decay_iters, variance
        self.register_buffer("estbn_moving_speed", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized x (N, C, H, W) in its dtype; in training mode it moves the estimates first."""
        mean, var = self.running_mean, self.running_var
        if self.training and x.numel() > 0:
            mean, var = self.update(*over_batch(*image_moments(wide(x.detach()))))
        return F.batch_norm(x, mean, var, self.weight, self.bias, training=False, eps=self.eps)

    @torch.no_grad()
    def update(self, mean: Tensor, var: Tensor) -> Tensor:
        """Move the estimates by one step towards the mean and the biased variance of a batch, (C,) each.

        Returns running_mean and running_var after it, (2, C), as constants that later steps do not change.
        """
        if self.variance == "official":
            var = var + (mean - self.running_mean).square()
        batch, state = torch.stack([mean, var]), torch.stack([self.running_mean, self.running_var])
        finite = batch.abs().amax() < torch.inf  # False for NaN too
        if self.update_rate is not None:
            self.num_batches_tracked.add_(finite)
            self.estbn_moving_speed.copy_(self._rate(self.num_batches_tracked))
        # Stacked, which torch.compile does not recompute: in backward it would read the buffers as they are by then.
        state = torch.where(finite, state.lerp(batch.to(state), self.estbn_moving_speed.to(state)), state)
        self.running_mean.copy_(state[0])
        self.running_var.copy_(state[1])
        return state

    def folded(self) -> tuple[Tensor | None, Tensor | None, nn.Module | None]:
        if self.training:
            return None, None, self
        scale = self.weight * torch.rsqrt(self.running_var + self.eps)
        return scale, self.bias - self.running_mean * scale, None

    def _rate(self, step: Tensor) -> Tensor:
        floor, step = self.update_rate, step.clamp(min=1)
        if self.decay_iters:
            floor = floor * (self.decay_iters / step).clamp(max=1)
        return (1 / step).clamp(min=floor)

    def _load_from_state_dict(self, state, prefix, *args) -> None:
        super()._load_from_state_dict(state, prefix, *args)
        if self.update_rate is not None and not self.num_batches_tracked and self.running_mean.any():
            self.num_batches_tracked.fill_(round(1 / self.update_rate))

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, update_rate={self.update_rate}, decay_iters={self.decay_iters}, "
            f"variance={self.variance}"
        )


def over_batch(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of each channel (C,) from those of its images (N, C), all of one size."""
    centre = mean.mean(0)
    return centre, (var + (mean - centre).square()).mean(0)


def _check_options(update_rate: float | None, decay_iters: int, variance: str) -> None:
    if update_rate is not None and not 0 < update_rate <= 1:
        raise UserError(
            f"EstBN: UPDATE_RATE is {update_rate}; it must lie in (0, 1], e.g. 0.01. At 0 the estimates would never "
            "move and the layer would be a plain affine map, without an error anywhere"
        )
    if decay_iters < 0:
        raise UserError(f"EstBN: DECAY_ITERS is {decay_iters}; it counts steps and must be 0 (off) or more")
    if variance not in ("official", "batch"):
        raise UserError(f"EstBN: VARIANCE is {variance!r}; it must be 'official' or 'batch'")
