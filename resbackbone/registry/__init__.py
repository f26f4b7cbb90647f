"""The registries, how the ``type`` of a config becomes a class, and initialization by ``init_cfg``.

mmengine finds this module by its path (``<scope>.registry``), which is how ``type="resbackbone.ResNet"`` works in any
OpenMMLab config without an import.
"""

try:
    import mmengine.registry  # noqa: F401
except ImportError as error:
    raise ImportError(
        "resbackbone needs mmengine, which comes in two distributions under one import name; install one of them: "
        "pip install 'resbackbone[mm]' (onedl-mmengine and onedl-mmcv, maintained) or "
        "pip install 'resbackbone[openmmlab]' (mmengine and mmcv-lite)"
    ) from error

from resbackbone.registry.registries import (
    DATA_SAMPLERS,
    DATASETS,
    HOOKS,
    LOOPS,
    METRICS,
    MODEL_WRAPPERS,
    MODELS,
    OPTIM_WRAPPER_CONSTRUCTORS,
    OPTIMIZERS,
    RUNNERS,
    TRANSFORMS,
    construct,
)
from resbackbone.registry.types import add_scope, is_ours, register_kind, resolve_type, split_type

__all__ = [
    "DATASETS",
    "DATA_SAMPLERS",
    "HOOKS",
    "LOOPS",
    "METRICS",
    "MODELS",
    "MODEL_WRAPPERS",
    "OPTIMIZERS",
    "OPTIM_WRAPPER_CONSTRUCTORS",
    "RUNNERS",
    "TRANSFORMS",
    "add_scope",
    "construct",
    "is_ours",
    "register_kind",
    "resolve_type",
    "split_type",
]
