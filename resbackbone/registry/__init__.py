"""The registries, and how a type name in a config becomes a class.

mmengine finds this module by its path (``<scope>.registry``), which is how ``type="resbackbone.ResNet"`` works in any
OpenMMLab config without an import.
"""

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
    check_initializers,
    construct,
    find_initializer,
    find_type,
    is_ours,
    of_kind,
    registered_types,
    scoped,
    split_type,
)

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
    "check_initializers",
    "construct",
    "find_initializer",
    "find_type",
    "is_ours",
    "of_kind",
    "registered_types",
    "scoped",
    "split_type",
]
