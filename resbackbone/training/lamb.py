"""LAMB optimizer, for very large batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from resbackbone.registry import OPTIMIZERS


@OPTIMIZERS.register_module()
class LAMB(Optimizer):
    """Adam with a layer-wise adaptive learning rate: each tensor's update has ``lr`` times the norm of the tensor.

    Parameters without weight decay, usually biases and norms, get plain Adam updates, as is customary. Gradients are
    not clipped here; the reference implementation clips their norm to 1 (``clip_grad=dict(max_norm=1.0)``).

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate.
        betas: Decay rates of the running averages of the gradient and its square.
        eps: Added to the denominator for numerical stability.
        weight_decay: Decoupled weight decay, added to the update before it is scaled.

    Source: You et al., Large Batch Optimization for Deep Learning: Training BERT in 76 minutes, ICLR 2020, algorithm 2.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
    ) -> None:
        if lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(
                "`lr`, `eps` and `weight_decay` must not be negative and `betas` be in [0, 1), got "
                f"lr={lr}, eps={eps}, weight_decay={weight_decay}, betas={betas}"
            )
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one optimization step.

        Args:
            closure: Recomputes the loss; optional.

        Returns:
            The loss of the closure.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))
        state["step"] += 1
        first, second = group["betas"]
        mean = state["exp_avg"].lerp_(grad, 1 - first) / (1 - first ** state["step"])
        square = state["exp_avg_sq"].lerp_(grad.square(), 1 - second) / (1 - second ** state["step"])
        update = mean / (square.sqrt() + group["eps"])
        if group["weight_decay"]:
            update.add_(parameter, alpha=group["weight_decay"])
            norm, update_norm = parameter.norm(), update.norm()
            # The trust ratio is 1 where either norm is zero.
            update.mul_(torch.where((norm > 0) & (update_norm > 0), norm / update_norm, 1.0))
        parameter.add_(update, alpha=-group["lr"])
