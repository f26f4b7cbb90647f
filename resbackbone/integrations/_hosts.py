"""Register this library's classes under their plain names in an OpenMMLab host."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import version

from torch import nn

from resbackbone.utils.logs import log_info_later


def replace_in_registry(host: str, classes: Mapping[str, type[nn.Module]], *, install: str) -> None:
    """Make plain names in a host's registry mean our classes, whatever they meant before.

    Doing it again changes nothing.

    Args:
        host: The host's import name, such as "mmdet".
        classes: Our classes by name. All of a family belong here: the host's own ResNeXt would keep the host's ResNet.
        install: The commands that install the host, for the error.

    Raises:
        ImportError: If the host or something that it needs is not installed.
    """
    try:
        # The host's own backbones come first: they refuse to register under a name that is taken.
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
