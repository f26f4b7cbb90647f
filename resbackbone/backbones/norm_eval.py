"""The base class of modules that keep batch norms in eval mode, from construction on."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from resbackbone.backbones.pretrained import PretrainedModule


class NormEvalModule(PretrainedModule):
    """A module that keeps every batch norm, synchronized ones too, in eval mode under ``norm_eval``.

    They are in eval mode when the outermost constructor ends, also those that a subclass adds in its constructor.

    Args:
        init_cfg: As for :class:`~resbackbone.backbones.pretrained.PretrainedModule`.
    """

    norm_eval: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            cls.__init__ = _completed(cls.__init__)  # type: ignore[method-assign]

    def complete(self) -> None:
        """Finish construction, when the outermost constructor ends."""
        if self.norm_eval:
            eval_batch_norms(self)

    def train(self, mode: bool = True) -> Any:
        """Set training (or eval) mode; batch norms stay in eval mode under ``norm_eval``.

        Returns:
            The module itself.
        """
        super().train(mode)
        if mode and self.norm_eval:
            eval_batch_norms(self)
        return self


def eval_batch_norms(net: nn.Module) -> None:
    """Set all batch norms of a model, including synchronized ones, to eval mode."""
    for module in net.modules():
        if isinstance(module, _BatchNorm):
            module.eval()


def _completed(constructor: Callable[..., None]) -> Callable[..., None]:
    """Wrap a constructor to call :meth:`NormEvalModule.complete` at the end of the outermost one."""

    @wraps(constructor)
    def construct(self: NormEvalModule, *args: Any, **kwargs: Any) -> None:
        is_outermost = "_in_construction" not in vars(self)
        vars(self)["_in_construction"] = True
        constructor(self, *args, **kwargs)
        if is_outermost:
            del vars(self)["_in_construction"]
            self.complete()

    return construct
