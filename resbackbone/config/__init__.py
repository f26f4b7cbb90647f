"""Backbone configs: a name, a file or a dict becomes a checked config, and that a backbone."""

from resbackbone.config.build import (
    BackboneConfig,
    BackboneSource,
    build_backbone,
    check_arguments,
    config_files,
    config_folder,
    construct_backbone,
    list_backbones,
    load_config,
    recorded_costs,
)

__all__ = [
    "BackboneConfig",
    "BackboneSource",
    "build_backbone",
    "check_arguments",
    "config_files",
    "config_folder",
    "construct_backbone",
    "list_backbones",
    "load_config",
    "recorded_costs",
]
