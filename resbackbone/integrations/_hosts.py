"""Putting our backbones under plain names into the registry of an OpenMMLab host."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module

from resbackbone.backbones import ResNet, ResNetV1b, ResNetV1c, ResNetV1d, ResNeXt, WideResNet

FAMILY: tuple[type[ResNet], ...] = (ResNet, ResNetV1b, ResNetV1c, ResNetV1d, ResNeXt, WideResNet)


def replace_in_registry(host: str, backbones: Iterable[type[ResNet]], *, install: str) -> None:
    """Make the plain class names of ``backbones`` mean them in a host's registry, whatever they meant before.

    Doing it again changes nothing.

    Args:
        host: The host's import name, such as "mmdet".
        backbones: The classes. All of a family belong here: the host's own ResNeXt would keep the host's ResNet.
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
    for backbone in backbones:
        registry.register_module(name=backbone.__name__, module=backbone, force=True)
