"""What every norm promises, parametrized over `NORMS` so that a new one is tested at once.

Each norm also has a file of its own, where it meets an oracle.
"""

import copy

import pytest
import torch
from norm_cases import CHANNELS, LAYOUTS, new_input, new_norm, run

from retinanet.errors import UserError
from retinanet.layers.conv import CONVS
from retinanet.layers.norm import NORMS, default_conv, make_norm

EVERY_NORM = pytest.mark.parametrize("name", NORMS)


@EVERY_NORM
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_has_shape_dtype_and_layout_of_the_input(name, training, layout, dtype):
    x = new_input(layout, dtype=dtype)
    y = new_norm(name).train(training)(x)
    assert y.shape == x.shape and y.dtype == dtype and y.isfinite().all()
    if layout == "channels_last":
        assert y.is_contiguous(memory_format=torch.channels_last)


@EVERY_NORM
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_memory_layout_changes_no_number(name, training, layout):
    norm = new_norm(name, torch.float64).train(training)
    expected = run(copy.deepcopy(norm), new_input(dtype=torch.float64))
    torch.testing.assert_close(run(norm, new_input(layout, dtype=torch.float64)), expected, rtol=1e-9, atol=1e-9)


@EVERY_NORM
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics_are_float32_under_autocast(name, training, layout):
    """4096 values around 30: summed in bfloat16 they would be off by whole deviations, and so would the output."""
    x = (new_input(layout, (2, CHANNELS, 64, 32)) + 30).bfloat16()
    norm, oracle = new_norm(name).train(training), new_norm(name, torch.float64).train(training)
    with torch.autocast("cpu", torch.bfloat16):
        results = run(norm, x)
    expected = run(oracle, x.double())
    assert all(grad.dtype == torch.float32 for grad in results[2:])
    for result, exact in zip(results, expected, strict=True):
        assert (result.double() - exact).abs().max() <= 0.02 * exact.abs().max()  # bfloat16 rounds at 2^-8 = 0.004
    for result, exact in zip(norm.buffers(), oracle.buffers(), strict=True):
        assert result.dtype != torch.bfloat16
        torch.testing.assert_close(result.double(), exact.double(), rtol=1e-3, atol=1e-3)


@EVERY_NORM
def test_folded_equals_forward_in_evaluation(name):
    norm = new_norm(name, torch.float64).eval()
    x = new_input(dtype=torch.float64)
    scale, shift, rest = norm.folded()
    folded = x if scale is None else scale.view(1, -1, 1, 1) * x + shift.view(1, -1, 1, 1)
    torch.testing.assert_close(folded if rest is None else rest(folded), norm(x), rtol=1e-10, atol=1e-10)


@EVERY_NORM
def test_folded_in_training_is_nothing_or_holds_for_training(name):
    norm = new_norm(name, torch.float64).train()
    scale, shift, rest = norm.folded()
    if norm.folds_in_training:
        x = new_input(dtype=torch.float64)
        torch.testing.assert_close(scale.view(1, -1, 1, 1) * x + shift.view(1, -1, 1, 1), norm(x))
    else:
        assert scale is None and shift is None and rest is norm


@EVERY_NORM
def test_all_state_is_in_the_state_dict(name):
    """A norm that is saved after two steps and loaded into a new one goes on bit for bit, and evaluates alike."""
    one, other = new_norm(name).train(), make_norm(name, CHANNELS).train()
    for seed in range(2):
        run(one, new_input(seed=seed))
    assert other.load_state_dict(copy.deepcopy(one.state_dict())) == ([], [])
    for seed in range(2, 4):
        x = new_input(seed=seed)
        torch.testing.assert_close(run(other, x), run(one, x), rtol=0, atol=0)
    torch.testing.assert_close(other.eval()(x), one.eval()(x), rtol=0, atol=0)


@EVERY_NORM
def test_evaluation_moves_nothing_and_training_moves_what_has_statistics(name):
    norm = new_norm(name)
    before = copy.deepcopy(norm.state_dict())
    run(norm.eval(), new_input())
    torch.testing.assert_close(norm.state_dict(), before, rtol=0, atol=0)
    run(norm.train(), new_input())
    moved = any(not torch.equal(value, before[key]) for key, value in norm.state_dict().items())
    assert moved == norm.has_statistics


@EVERY_NORM
def test_evaluation_of_an_image_does_not_depend_on_the_batch(name):
    norm = new_norm(name, torch.float64).eval()
    x = new_input(dtype=torch.float64)
    torch.testing.assert_close(norm(x[1:]), norm(x)[1:], rtol=1e-12, atol=1e-12)


@EVERY_NORM
def test_batch_of_one_trains(name):
    results = run(new_norm(name).train(), new_input(shape=(1, CHANNELS, 3, 4)))
    assert all(result.isfinite().all() for result in results)


@EVERY_NORM
def test_one_pixel_evaluates_and_trains_or_says_why_not(name):
    x = new_input(shape=(1, CHANNELS, 1, 1))
    norm = new_norm(name)
    assert norm.eval()(x).isfinite().all()
    try:
        assert norm.train()(x).isfinite().all()
    except UserError as error:  # batch statistics of one value
        assert norm.has_statistics and "one value per channel" in str(error)


@EVERY_NORM
def test_empty_batch_moves_no_statistics(name):
    norm = new_norm(name).train()
    before = copy.deepcopy(norm.state_dict())
    results = run(norm, torch.zeros(0, CHANNELS, 4, 4))
    assert results[0].shape == (0, CHANNELS, 4, 4)
    assert all(not grad.any() for grad in results[2:])
    for key, value in norm.state_dict().items():
        assert key.endswith("num_batches_tracked") or torch.equal(value, before[key]), key


@EVERY_NORM
@pytest.mark.parametrize("training, layout", [(True, "contiguous"), (True, "channels_last"), (False, "contiguous")])
def test_norm_compiles_without_graph_breaks(name, training, layout):
    norm, x = new_norm(name).train(training), new_input(layout)
    compiled = torch.compile(copy.deepcopy(norm), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled, x), run(norm, x), rtol=1e-5, atol=1e-5)


@EVERY_NORM
def test_norm_describes_itself(name):
    norm = make_norm(name, CHANNELS)
    assert type(norm.has_statistics) is bool and type(norm.folds_in_training) is bool
    assert default_conv(name) == norm.conv_kind and norm.conv_kind in CONVS
    assert str(CHANNELS) in repr(norm) or "groups" in repr(norm)


def test_empty_name_is_no_norm():
    assert make_norm("", CHANNELS) is None
    assert default_conv("") == "plain"


def test_unknown_norm_names_the_nearest():
    with pytest.raises(UserError, match="'GroupNrom' is not one of AffineChannel, .*"):
        make_norm("GroupNrom", CHANNELS)
    with pytest.raises(UserError, match="did you mean 'FrozenBN'"):
        default_conv("FrozenBn")
