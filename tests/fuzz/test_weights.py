"""Tensors of other shapes, kinds and names in files of weights; for damaged bytes see tests/weights/test_read.py."""

import pytest
import torch
from fuzz_profile import count, tried
from hypothesis import given
from hypothesis import strategies as st
from weights.cases import AFFINE, BN, FROZEN, GN, R18, assert_complete, make_model, write

from retinanet.errors import UserError
from retinanet.weights.compare import Inputs
from retinanet.weights.load import load_weights
from retinanet.weights.source import AnchorOrder


@pytest.fixture(scope="module")
def small_state() -> dict[str, torch.Tensor]:
    return make_model(*R18, *BN).state_dict()


@pytest.fixture(scope="module")
def small_models() -> list[torch.nn.Module]:
    return [make_model(*R18, *norm) for norm in (BN, AFFINE, FROZEN, GN)]


@tried(25)
@given(data=st.data())
def test_any_state_dict_is_loaded_or_refused(data, small_state, small_models, tmp_path):
    """Tensors of wrong shapes, kinds and names end in a report or in a `UserError`, and in nothing else."""
    state = dict(small_state)
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(state)))
        shape = data.draw(st.sampled_from([(), (1,), (3,), (0,), (27,), (64,), (2, 3), (64, 1, 1, 1), (1, 64, 1, 1)]))
        dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.int64, torch.bool, torch.complex64]))
        action = data.draw(st.sampled_from(["replace", "drop", "rename", "transpose"]))
        if action == "replace":
            state[name] = torch.zeros(shape, dtype=dtype)
        elif action == "transpose":
            state[name] = state[name].flatten().flip(0)
        else:
            value = state.pop(name)
            if action == "rename":
                state[name[::-1]] = value
    order = AnchorOrder("torchvision", (0.5, 1.0, 2.0), 3, True)
    model = data.draw(st.sampled_from(small_models))
    try:
        report = load_weights(
            model,
            write(tmp_path / "w.pth", state),
            inputs=Inputs("BGR", anchors=order),
            allow_missing=data.draw(st.booleans()),
        )
    except UserError as error:
        assert "w.pth" in str(error)
        count("weights, tensors", "refused")
    else:
        assert_complete(report, model, set(state))
        assert all(value.isfinite().all() for value in model.state_dict().values())
        count("weights, tensors", "right")
