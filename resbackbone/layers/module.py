"""The base classes of the modules here: ``nn.Module`` with mmengine's initialization protocol and folding of norms.

mmengine's own ``BaseModule`` is not inherited from, because importing it costs most of a second; it is asked to do the
work the first time weights are initialized.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any, NoReturn

from resbackbone.layers.conv_norm import ConvNormModule
from resbackbone.layers.memory_format import restore_format
from resbackbone.layers.tracing import refuse_scripting
from resbackbone.registry.initialization import initialize

Config = dict[str, Any]
InitConfig = Config | list[Config]


class Module(ConvNormModule):
    """An ``nn.Module`` with an ``init_cfg`` that ``init_weights()`` carries out.

    Args:
        init_cfg: One or several initializers as mmengine describes them, such as ``dict(type="Kaiming",
            layer="Conv2d")``. They run before those of the children, ``type="Pretrained"`` after everything else.
            The dict is copied.
    """

    def __init__(self, init_cfg: InitConfig | None = None) -> None:
        super().__init__()
        self.init_cfg = copy.deepcopy(init_cfg)
        self.is_init = False

    def __prepare_scriptable__(self) -> NoReturn:
        """Refuse ``torch.jit.script``, which asks here first, and would fail with the name of some annotation."""
        refuse_scripting(self)

    def init_weights(self) -> None:
        """Initialize this module by its ``init_cfg``, then its children by theirs; once, however often it is called.

        Raises:
            FileNotFoundError, KeyError, OSError, TypeError, ValueError: As
                :func:`~resbackbone.registry.initialization.initialize` says.
        """
        from mmengine.model import BaseModule

        initialize(self, partial(BaseModule.init_weights, self))

    @property
    def _is_init(self) -> bool:
        """The name under which mmengine's ``init_weights`` reads and writes ``is_init``."""
        return self.is_init

    @_is_init.setter
    def _is_init(self, value: bool) -> None:
        self.is_init = value

    def _dump_init_info(self) -> None:
        """Do nothing: a backbone on its own leaves the log of every parameter to the host that trains it."""


class FeatureModule(Module):
    """A module with feature maps as outputs: a backbone, a neck, a shared head.

    When folding, its outputs have the memory format that they have without.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run :meth:`forward` with its hooks."""
        call = super().__call__
        return restore_format(self, call, args, kwargs) if self.folds_norms else call(*args, **kwargs)
