"""One norm per pyramid level where the norm keeps statistics, with one weight and bias for all levels.

The shared head runs over P3..P7, whose activations differ in their statistics. One running mean over all five would
fit none of them, and a norm with a window would mix levels in it (detectron2's `CycleBatchNormList` has the same
purpose, with a counter instead of the level).
"""

from collections.abc import Callable

from torch import Tensor, nn


class PerLevelNorm(nn.Module):
    """`num_levels` norms that share their parameters and keep their buffers apart.

    make: builds one norm. The state dict holds each parameter once, as `weight` and `bias` (a `bn.weight` of the norm
    as `bn_weight`), and the buffers as `levels.{i}.running_mean` and so on.
    """

    has_statistics = True
    folds_in_training = False
    takes_level = True

    def __init__(self, make: Callable[[], nn.Module], num_levels: int = 5):
        super().__init__()
        norms = [make() for _ in range(num_levels)]
        self.conv_kind = norms[0].conv_kind
        self._shared = {name.replace(".", "_"): name for name, _ in norms[0].named_parameters()}
        for own, name in self._shared.items():  # before the levels, so that `named_parameters` knows each by this name
            setattr(self, own, norms[0].get_parameter(name))
        self.levels = nn.ModuleList(norms)
        self._tie()
        self.register_state_dict_post_hook(_drop_repeated)
        self.register_load_state_dict_pre_hook(_add_repeated)
        self.register_load_state_dict_post_hook(_tie_again)

    def forward(self, x: Tensor, level: int) -> Tensor:
        """Return x (N, C, H, W) normalized by the norm of `level`, a position among the levels from 0."""
        return self.levels[level](x)

    def folded(self) -> tuple[None, None, nn.Module]:
        """Nothing folds into the conv, which all levels share; `levels[i].folded()` tells what folds at one level."""
        return None, None, self

    def _tie(self) -> None:
        for own, name in self._shared.items():
            owner, _, attribute = name.rpartition(".")
            for norm in self.levels:
                setattr(norm.get_submodule(owner), attribute, getattr(self, own))

    def _repeated(self, prefix: str) -> list[tuple[str, str]]:
        """Return (parameter, its name in the state dict of one level) for every level and shared parameter."""
        levels = range(len(self.levels))
        return [(own, f"{prefix}levels.{level}.{name}") for level in levels for own, name in self._shared.items()]


def _drop_repeated(module: PerLevelNorm, state: dict, prefix: str, _metadata: dict) -> None:
    for _, repeated in module._repeated(prefix):
        del state[repeated]


def _add_repeated(module: PerLevelNorm, state: dict, prefix: str, *_unused) -> None:
    """Give every level what it expects; a parameter that is not in `state` is then reported missing only once."""
    for name, repeated in module._repeated(prefix):
        state[repeated] = state.get(prefix + name, getattr(module, name))


def _tie_again(module: PerLevelNorm, _incompatible_keys) -> None:
    """`load_state_dict(assign=True)` gives every level a parameter object of its own."""
    module._tie()
