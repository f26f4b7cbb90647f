"""A forward pass of ResNet-50 calls few Python functions of the package, as it should read from top to bottom."""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import resbackbone
from resbackbone import build_backbone

PACKAGE = str(Path(resbackbone.__file__).parent)


def count_calls(function, *args):
    """Count the calls of the package's functions while ``function`` runs, by file and name."""
    calls = Counter()

    def count(frame, event, unused):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGE):
            calls[f"{Path(code.co_filename).relative_to(PACKAGE)}: {code.co_name}"] += 1

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        function(*args)
    finally:
        sys.setprofile(before)
    return calls


def test_calls_are_counted_by_function():
    net = build_backbone("resnet18")
    images = torch.randn(1, 3, 64, 64)
    assert count_calls(net, images)["backbones/resnet.py: forward"] == 1
    assert not count_calls(torch.nn.ReLU(), images)


@pytest.mark.parametrize(("fold_frozen_norms", "limit"), [(False, 120), (True, 200)])
def test_a_forward_pass_of_resnet50_makes_few_calls(fold_frozen_norms, limit):
    net = build_backbone("resnet50", fold_frozen_norms=fold_frozen_norms).train()
    images = torch.randn(1, 3, 64, 64)
    net(images)  # what is made once and kept
    calls = count_calls(net, images)
    table = "\n".join(f"{count:5} {name}" for name, count in calls.most_common())
    assert calls.total() <= limit, f"{calls.total()} calls, {limit} allowed:\n{table}"
