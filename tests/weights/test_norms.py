"""A norm of a file becomes the model's norm with the same function, or is refused with the reason."""

import pytest
import torch
import torch.nn.functional as F

from retinanet.errors import UserError
from retinanet.layers.norm import NORMS, PerLevelNorm, make_norm
from retinanet.weights.norms import NormRefused, convert_norm, fold, kind_of, kind_of_leaves, norms_of

KINDS = {"AffineChannel": "affine", "FrozenBN": "frozen", "BN": "batch", "SyncBN": "batch", "GN": "group"}
KINDS |= {"MABN": "moment", "BCN": "channel"}
BATCH = ("weight", "bias", "running_mean", "running_var")


def batch_leaves(channels: int = 32, var: float = 1.0) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    leaves = {name: torch.randn(channels) for name in BATCH}
    leaves["running_var"] = var * (0.1 + torch.rand(channels))
    return leaves


def x(channels: int = 32) -> torch.Tensor:
    return torch.randn(2, channels, 3, 4, generator=torch.Generator().manual_seed(5))


def loaded(name: str, leaves: dict, **options) -> torch.nn.Module:
    norm = make_norm(name, len(leaves["weight"]), **options).eval()
    norm.load_state_dict(leaves)
    return norm


def test_every_norm_has_a_kind():
    assert {name: kind_of(make_norm(name, 64)) for name in NORMS} == KINDS


def test_learnable_affine_channel_is_affine_and_levels_have_the_kind_of_one():
    assert kind_of(make_norm("AffineChannel", 8, learnable=True)) == "affine"
    assert kind_of(PerLevelNorm(lambda: make_norm("BN", 8))) == "batch"


def test_norms_inside_norms_are_not_listed():
    model = torch.nn.ModuleDict({"a": make_norm("BCN", 64), "b": PerLevelNorm(lambda: make_norm("BN", 8))})
    assert sorted(norms_of(model)) == ["a", "b"]


@pytest.mark.parametrize("name", NORMS)
def test_the_kind_of_a_state_is_the_kind_of_its_norm(name):
    norm = make_norm(name, 64)
    expected = KINDS[name].replace("frozen", "batch")
    assert kind_of_leaves(norm.state_dict(), expected == "affine", "group") == expected


def test_folding_by_hand():
    leaves = {"weight": torch.tensor([6.0]), "bias": torch.tensor([1.0])}
    leaves |= {"running_mean": torch.tensor([2.0]), "running_var": torch.tensor([8.0])}
    folded = fold(leaves, eps=1.0)  # sqrt(8 + 1) = 3
    assert (folded["weight"].item(), folded["bias"].item()) == (2.0, 1.0 - 2.0 * 2.0)


@pytest.mark.parametrize("eps", [0.0, 1e-5, 1e-3])
@pytest.mark.parametrize("var", [1.0, 1e-6])
@pytest.mark.parametrize(
    ("name", "options"), [("AffineChannel", {}), ("FrozenBN", {}), ("FrozenBN", {"eps": 0.0}), ("BN", {"eps": 1e-3})]
)
def test_batch_norm_keeps_its_function(name, options, eps, var):
    leaves = batch_leaves(var=var)
    norm = loaded(name, convert_norm(leaves, "batch", make_norm(name, 32, **options), eps), **options)
    wide = {leaf: tensor.double() for leaf, tensor in leaves.items()}
    expected = F.batch_norm(x().double(), wide["running_mean"], wide["running_var"], wide["weight"], wide["bias"],
                            eps=eps) if eps else _without_eps(wide)  # fmt: skip
    # a moving norm has to hide the eps in running_var, where float32 has few digits left when that is tiny
    rtol = 1e-3 if name == "BN" and var < 1e-3 else 1e-5
    torch.testing.assert_close(norm(x()).double(), expected, rtol=rtol, atol=1e-6 * expected.abs().max().item())


def _without_eps(leaves: dict[str, torch.Tensor]) -> torch.Tensor:
    columns = {name: leaf.view(1, -1, 1, 1) for name, leaf in leaves.items()}
    centred = x().double() - columns["running_mean"]
    return centred / columns["running_var"].sqrt() * columns["weight"] + columns["bias"]


def test_equal_eps_changes_no_value():
    leaves = batch_leaves()
    converted = convert_norm(leaves, "batch", make_norm("FrozenBN", 32), 1e-5)
    assert all(converted[name] is leaves[name] for name in BATCH)


@pytest.mark.parametrize("eps", [0.0, 1e-5, 1e-2])
def test_folded_statistics_become_frozen_batch_norm_exactly(eps):
    leaves = {name: batch_leaves()[name] for name in ("weight", "bias")}
    norm = loaded("FrozenBN", convert_norm(leaves, "affine", make_norm("FrozenBN", 32, eps=eps), 1e-5), eps=eps)
    expected = x() * leaves["weight"].view(1, -1, 1, 1) + leaves["bias"].view(1, -1, 1, 1)
    torch.testing.assert_close(norm(x()), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "name", "reason"),
    [
        ("affine", "BN", "already contain the statistics"),
        ("affine", "SyncBN", "already contain the statistics"),
        ("affine", "GN", "not those of a normalized activation"),
        ("affine", "MABN", "another kind of norm"),
        ("batch", "GN", "no place in a norm without running statistics"),
        ("batch", "MABN", "about zero, and the shift by the mean would be lost"),
        ("batch", "BCN", "without standardized weights"),
        ("group", "AffineChannel", "another kind of norm"),
        ("group", "FrozenBN", "another kind of norm"),
        ("group", "BN", "another kind of norm"),
        ("moment", "BN", "another kind of norm"),
        ("moment", "AffineChannel", "another kind of norm"),
        ("channel", "GN", "another kind of norm"),
    ],
)
def test_values_that_mean_nothing_in_a_norm_are_refused_with_the_reason(kind, name, reason):
    with pytest.raises(NormRefused, match=reason):
        convert_norm(batch_leaves(64), kind, make_norm(name, 64), 1e-5)


def test_group_norm_of_other_groups_is_refused():
    leaves = {name: torch.ones(32) for name in ("weight", "bias")}
    assert convert_norm(leaves, "group", make_norm("GN", 32), 1e-5) == leaves
    with pytest.raises(NormRefused, match="made for 32 groups, not 8"):
        convert_norm(leaves, "group", make_norm("GN", 32, groups=8), 1e-5)
    assert convert_norm(leaves, "group", make_norm("GN", 32, groups=8), 1e-5, groups=8) == leaves
    with pytest.raises(NormRefused, match="made for 8 groups, not 32; set MODEL.NORM_OPTIONS.GN.GROUPS 8"):
        convert_norm(leaves, "group", make_norm("GN", 32), 1e-5, groups=8)


@pytest.mark.parametrize("name", ["GN", "AffineChannel"])
def test_a_bare_native_norm_is_taken_for_what_the_model_has(name):
    leaves = {leaf: batch_leaves()[leaf] for leaf in ("weight", "bias")}
    assert convert_norm(leaves, "", make_norm(name, 32), 1e-5) == leaves


@pytest.mark.parametrize(("kind", "name"), [("batch", "AffineChannel"), ("affine", "FrozenBN")])
def test_half_a_norm_gives_nothing(kind, name):
    leaves = batch_leaves()
    del leaves["weight"]
    assert convert_norm(leaves, kind, make_norm(name, 32), 1e-5) == {}


def test_moments_with_windows_are_taken_as_they_are():
    norm = make_norm("MABN", 8)
    leaves = {name: torch.rand_like(tensor.float()) for name, tensor in norm.state_dict().items()}
    assert convert_norm(leaves, "moment", make_norm("MABN", 8), 1e-5) == leaves


def test_moments_without_windows_start_counting_again():
    leaves = {"weight": torch.ones(8), "bias": torch.zeros(8), "running_var": torch.full((8,), 3.0)}
    leaves["iters"] = torch.tensor([600.0])  # of the classification layer, whose windows are others
    norm = make_norm("MABN", 8)
    norm.load_state_dict(convert_norm(leaves, "moment", norm, 1e-5))
    assert norm.iters.tolist() == [0]
    assert norm.running_var.flatten().tolist() == [3.0] * 8
    assert not norm.buffer_x2.any()


def test_moments_reach_a_layer_with_another_window():
    leaves = make_norm("MABN", 8, simulated_batch=16).state_dict()
    leaves["buffer_x2"] = torch.full((8, 8), 2.0)
    leaves["iters"] = torch.tensor([500])
    norm = make_norm("MABN", 8, simulated_batch=32)
    norm.load_state_dict(convert_norm(leaves, "moment", norm, 1e-5))
    assert norm.buffer_x2.shape == (16, 8)
    assert (norm.buffer_x2 == 2).all()


@pytest.mark.parametrize("estimate", [True, False])
def test_the_batch_half_of_bcn_may_come_from_batch_norm_or_from_estimates(estimate):
    source = make_norm("BCN", 64, estimate=not estimate).eval()
    for tensor in source.state_dict().values():
        tensor.copy_(0.5 + torch.rand(tensor.shape) if tensor.is_floating_point() else 5)
    norm = make_norm("BCN", 64, estimate=estimate).eval()
    norm.load_state_dict(convert_norm(source.state_dict(), "channel", norm, 1e-5))
    torch.testing.assert_close(norm(x(64)), source(x(64)))


def test_mabn_itself_refuses_batch_norm():
    with pytest.raises(UserError, match="running_mean"):
        make_norm("MABN", 32).load_state_dict(batch_leaves())


def test_counters_that_the_file_lacks_start_at_zero():
    converted = convert_norm(batch_leaves(), "batch", make_norm("BN", 32), 1e-5)
    assert converted["num_batches_tracked"] == 0


def test_statistics_per_level_keep_their_levels():
    norm = PerLevelNorm(lambda: make_norm("BN", 4, eps=1e-3))
    leaves = dict(PerLevelNorm(lambda: make_norm("BN", 4)).state_dict())
    for level in range(5):
        leaves[f"levels.{level}.running_var"] = torch.full((4,), 1.0 + level)
    converted = convert_norm(leaves, kind_of_leaves(leaves, False, "group"), norm, 1e-5)
    assert converted.keys() == norm.state_dict().keys()
    assert converted["levels.3.running_var"].tolist() == pytest.approx([4.0 + 1e-5 - 1e-3] * 4)
