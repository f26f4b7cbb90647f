"""Backbone configs: load and validate a name, a file or a dict, and build the backbone."""

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
