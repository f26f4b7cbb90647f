"""LAMB optimizer."""

import pytest
import torch
from torch import nn

from resbackbone.training import LAMB


def test_lamb_update():
    start, decayless = torch.randn(5, 3), torch.randn(4)
    weight, bias = nn.Parameter(start.clone()), nn.Parameter(decayless.clone())
    groups = [{"params": [weight]}, {"params": [bias], "weight_decay": 0.0}]
    optimizer = LAMB(groups, lr=0.1, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.02)
    expected = {weight: start.double(), bias: decayless.double()}
    mean = {weight: torch.zeros(5, 3).double(), bias: torch.zeros(4).double()}
    square = {weight: torch.zeros(5, 3).double(), bias: torch.zeros(4).double()}
    for step in range(1, 4):
        for parameter in (weight, bias):
            parameter.grad = torch.randn_like(parameter)
            grad = parameter.grad.double()
            mean[parameter] = 0.8 * mean[parameter] + 0.2 * grad
            square[parameter] = 0.9 * square[parameter] + 0.1 * grad**2
            update = (mean[parameter] / (1 - 0.8**step)) / ((square[parameter] / (1 - 0.9**step)).sqrt() + 1e-6)
            if parameter is weight:
                update = update + 0.02 * expected[parameter]
                update = update * (expected[parameter].norm() / update.norm())
            expected[parameter] = expected[parameter] - 0.1 * update
        optimizer.step()
    torch.testing.assert_close(weight.detach(), expected[weight].float())
    torch.testing.assert_close(bias.detach(), expected[bias].float())


def test_lamb_update_norm():
    for scale in (1e-4, 1.0, 1e4):
        weight = nn.Parameter(torch.randn(6) * scale)
        before = weight.detach().clone()
        weight.grad = torch.randn(6)
        LAMB([weight], lr=0.01, weight_decay=1e-9).step()
        torch.testing.assert_close(
            (weight.detach() - before).norm() / before.norm(), torch.tensor(0.01), rtol=1e-3, atol=0
        )
    zeros = nn.Parameter(torch.zeros(3))
    zeros.grad = torch.ones(3)
    LAMB([zeros], lr=0.01, weight_decay=0.1).step()
    assert zeros.isfinite().all()
    assert zeros.ne(0).all()


def test_invalid_arguments():
    with pytest.raises(ValueError, match="`lr`, `eps` and `weight_decay` must not be negative"):
        LAMB([nn.Parameter(torch.ones(1))], lr=-1)
