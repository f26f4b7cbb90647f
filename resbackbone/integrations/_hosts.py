"""Registration of this library's classes under their plain names in an OpenMMLab host."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import version

from torch import nn

from resbackbone.utils.logs import log_info_later


def replace_in_registry(host: str, classes: Mapping[str, type[nn.Module]], *, install: str) -> None:
    """Register classes under plain names in a host's registry, replacing the host's own. Idempotent.

    Args:
        host: The host's import name, such as "mmdet".
        classes: The classes by name, for the whole family: the host's ResNeXt would still subclass the host's ResNet.
        install: The commands that install the host, for the error message.

    Raises:
        ImportError: If the host or one of its dependencies is not installed.
    """
    try:
        # Import the host's backbones first: registering under an existing name is an error for them.
        import_module(f"{host}.models")
        registry = import_module(f"{host}.registry").MODELS
    except ImportError as error:
        raise ImportError(
            f"resbackbone.integrations.{host} needs {host}, but: {error}; install it by {install}"
        ) from error
    if all(registry.module_dict.get(name) is module for name, module in classes.items()):
        return
    for name, module in classes.items():
        registry.register_module(name=name, module=module, force=True)
    log_info_later(f"the types {', '.join(classes)} of {host} are those of resbackbone {version('resbackbone')}")
