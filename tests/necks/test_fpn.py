"""`FPN`: argument checks; tests/hosts/test_mmdet.py compares its outputs with mmdet's."""

import pytest
import torch

from resbackbone.necks import FPN

CHANNELS = (8, 16, 32, 64)


INVALID = [
    (
        "outs_3",
        {"num_outs": 3},
        ValueError,
        "`num_outs` must be at least 4, the backbone levels from `start_level` 0 to 3; got 3",
    ),
    ("outs_0", {"num_outs": 0}, ValueError, "`num_outs` must be at least 1, got 0"),
    ("outs_float", {"num_outs": 4.0}, TypeError, "`num_outs` must be an integer, got 4.0"),
    ("outs_end", {"num_outs": 4, "end_level": 2}, ValueError, "`num_outs` must be exactly (an early `end_level`"),
    ("end_4", {"end_level": 4}, ValueError, "`end_level` must be from -1 to 3, got 4"),
    (
        "end_below_start",
        {"start_level": 2, "end_level": 1},
        ValueError,
        "`end_level` must not be below `start_level` (=2), got 1",
    ),
    ("start_4", {"start_level": 4}, ValueError, "`start_level` must be from 0 to 3, got 4"),
    ("start_text", {"start_level": "1"}, TypeError, "`start_level` must be an integer, got '1'"),
    ("in_number", {"in_channels": 256}, TypeError, "`in_channels` must be a list or tuple, got 256"),
    ("in_empty", {"in_channels": ()}, ValueError, "`in_channels` must have at least one entry, got ()"),
    ("in_0", {"in_channels": (8, 0)}, ValueError, "`in_channels[1]` must be at least 1, got 0"),
    ("out_0", {"out_channels": 0}, ValueError, "`out_channels` must be at least 1, got 0"),
    ("out_none", {"out_channels": None}, TypeError, "`out_channels` must be an integer, got None"),
    ("extra", {"add_extra_convs": "on_top"}, ValueError, "'on_input', 'on_lateral', 'on_output'; got 'on_top'"),
    ("flag", {"no_norm_on_lateral": 1}, TypeError, "`no_norm_on_lateral` must be True or False, got 1"),
    ("upsample", {"upsample_cfg": "nearest"}, TypeError, "`upsample_cfg` must be a dict, got 'nearest'"),
    ("norm_unknown", {"norm_cfg": {"type": "BM"}}, KeyError, "unknown norm type 'BM'"),
    ("norm_text", {"norm_cfg": "BN"}, TypeError, "`norm_cfg` must be a dict, got 'BN'"),
    ("act_unknown", {"act_cfg": {"type": "Relu"}}, KeyError, "unknown activation type 'Relu'; did you mean 'ReLU'?"),
]


@pytest.mark.parametrize(("arguments", "error", "text"), [pytest.param(*case[1:], id=case[0]) for case in INVALID])
def test_invalid_arguments_are_refused_before_anything_is_built(refused, arguments, error, text):
    with refused(error, text):
        FPN(**{"in_channels": CHANNELS, "out_channels": 8, "num_outs": 5, **arguments})


@pytest.mark.parametrize("count", [0, 3, 5])
def test_refuses_a_wrong_number_of_feature_maps(count):
    fpn = FPN(in_channels=CHANNELS, out_channels=8, num_outs=5)
    with pytest.raises(ValueError, match=f"FPN expects 4 feature maps, one per `in_channels`, got {count}"):
        fpn([torch.zeros(1, 8, 8, 8)] * count)
