"""Validation of ResNet's arguments, before anything is built."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from resbackbone.backbones.feature_info import OutIndex
from resbackbone.backbones.pretrained import check_initialization
from resbackbone.backbones.res_layer import DilationStyle
from resbackbone.blocks.base import check_dcn, check_plugin_names, check_plugins
from resbackbone.layers.activation_checkpointing import check_with_cp
from resbackbone.layers.arguments import MAX_BLOCKS, MAX_CHANNELS, MAX_PARTS, MAX_PIXELS
from resbackbone.layers.conv import check_conv_cfg
from resbackbone.layers.norm import check_norm_cfg
from resbackbone.utils.validation import (
    UnknownKeyError,
    check_choice,
    check_count,
    check_flag,
    check_int,
    check_ints,
    check_number,
    check_sequence,
    check_type,
    warn_user,
)

_FLAGS = (
    "deep_stem",
    "avg_down",
    "norm_eval",
    "fold_frozen_norms",
    "zero_init_residual",
    "contract_dilation",
    "project_first_block",
)


def check_resnet_arguments(block: Any, default_blocks: Sequence[int], **given: Any) -> None:
    """Raise unless the arguments of a ResNet are valid, each by itself and together.

    Args:
        block: The block class.
        default_blocks: The number of blocks per stage of the depth.
        given: Its constructor's arguments, every one.

    Raises:
        KeyError: If a type is unknown.
        TypeError, ValueError: If another argument does not fit.
    """
    for flag in _FLAGS:
        check_flag(flag, given[flag])
    check_with_cp(given["with_cp"])
    for channels in ("in_channels", "base_channels"):
        check_count(channels, given[channels], most=MAX_CHANNELS)
    _check_stem_channels(given)
    check_int("num_stages", given["num_stages"], low=1, high=4)
    check_choice("style", given["style"], ("pytorch", "caffe"))
    check_choice("dilation_style", given["dilation_style"], get_args(DilationStyle))
    check_count("groups", given["groups"], most=MAX_PARTS)
    check_count("base_width", given["base_width"], most=MAX_CHANNELS)
    if given["groups"] > 1 and getattr(block, "num_convs", 3) < 3:
        raise ValueError(
            f"`groups` must be 1 with a {block.__name__}, got {given['groups']}; take a depth of bottlenecks"
        )
    _check_stages(given, default_blocks)
    _check_layer_configs(given)
    _check_plugins(given["plugins"], given["num_stages"], block)
    check_initialization(given["pretrained"], given["init_cfg"])
    check_type("drop_path_rate", given["drop_path_rate"], (int, float), "a number from 0 to 1 (1 excluded)")
    check_number("drop_path_rate", given["drop_path_rate"], low=0, high=1, below=True)


def _check_stem_channels(given: Mapping[str, Any]) -> None:
    least = 2 if given["deep_stem"] else 1
    if isinstance(given["stem_channels"], (list, tuple)):
        if not given["deep_stem"]:
            raise ValueError(f"`stem_channels` must be one number without a deep stem, got {given['stem_channels']}")
        why = "one per convolution of a deep stem"
        check_ints("stem_channels", given["stem_channels"], low=1, most=MAX_CHANNELS, length=3, why=why)
    elif given["stem_channels"] is not None:
        check_count("stem_channels", given["stem_channels"], low=least, most=MAX_CHANNELS)
    elif given["base_channels"] < least:
        raise ValueError(
            f"`base_channels` must be at least 2 with a deep stem, got {given['base_channels']}: its first "
            "convolutions have half as many; or give `stem_channels`"
        )


def check_depth(name: str, depth: object, arch_settings: Mapping[int, Any]) -> None:
    """Raise KeyError unless ``depth`` is one that the class of this name knows."""
    if isinstance(depth, bool) or not isinstance(depth, int) or depth not in arch_settings:
        allowed = ", ".join(map(str, arch_settings))
        raise UnknownKeyError(f"`depth` of {name} must be one of {allowed}; got {depth!r}")


def resolve_out_indices(out_indices: Sequence[OutIndex], num_stages: int) -> tuple[OutIndex, ...]:
    """Return the outputs: "stem", if it is among them, and the stages, counted from 0, ascending.

    Raises:
        TypeError: If ``out_indices`` is no list or tuple of integers and "stem".
        ValueError: If it is empty, or an entry is out of range or named twice.
    """
    given = check_sequence("out_indices", out_indices)
    if not given:
        raise ValueError("`out_indices` must name at least one stage, got (); the last one alone is (-1,)")
    for index, entry in enumerate(given):
        if isinstance(entry, str) and entry != "stem":
            raise TypeError(
                f"`out_indices[{index}]` must be an integer, got {entry!r}; stages are counted from 0 (layer1 is 0), "
                "and only the stem's map has a name, 'stem'"
            )
    numbers = [(index, entry) for index, entry in enumerate(given) if not isinstance(entry, str)]
    stages = [check_int(f"out_indices[{index}]", entry, low=-num_stages) for index, entry in numbers]
    if stages and max(stages) >= num_stages:
        raise ValueError(f"`out_indices` must be below `num_stages` (={num_stages}), got {given}")
    stem: list[OutIndex] = ["stem" for entry in given if isinstance(entry, str)]
    resolved = (*stem, *sorted(stage % num_stages for stage in stages))
    if len(set(resolved)) < len(resolved):
        meaning = "" if resolved == given else f", which is {resolved}"
        raise ValueError(f"`out_indices` must name each stage once, got {given}{meaning}")
    return resolved


def truncate_arguments(given: Mapping[str, Any], num_stages: int) -> dict[str, Any]:
    """Return the arguments that must change for a ResNet to end after its first stages.

    Args:
        given: Its arguments by name, resolved or as they were given; beside them ``drop_path_rates``, for each stage
            its last block's, or None.
        num_stages: Number of stages to keep; all outputs must be theirs.

    Returns:
        The arguments by name; always ``num_stages``, ``strides`` and ``dilations``.
    """
    arguments: dict[str, Any] = {"num_stages": num_stages}
    for name in ("strides", "dilations", "stage_blocks"):
        if given[name] is not None:
            arguments[name] = tuple(given[name][:num_stages])
    if given["dcn"]:
        flags = tuple(given["stage_with_dcn"][:num_stages])
        arguments |= {"stage_with_dcn": flags} if any(flags) else {"dcn": None}
    if any(plugin.get("stages") is not None for plugin in given["plugins"] or ()):
        arguments["plugins"] = [
            {name: tuple(value[:num_stages]) if name == "stages" and value else value for name, value in plugin.items()}
            for plugin in given["plugins"]
        ]
    if given["multi_grid"] is not None:  # of the last stage
        arguments["multi_grid"] = None
    if given["drop_path_rates"] is not None:
        arguments["drop_path_rate"] = given["drop_path_rates"][num_stages - 1]
    if given["frozen_stages"] > num_stages:
        arguments["frozen_stages"] = num_stages
    if any(index != "stem" and index < 0 for index in given["out_indices"]):
        arguments["out_indices"] = resolve_out_indices(given["out_indices"], len(given["strides"]))
    return arguments


def _check_stages(given: Mapping[str, Any], default_blocks: Sequence[int]) -> None:
    num_stages = given["num_stages"]
    per_stage = f"one per stage, `num_stages`={num_stages}"
    for name in ("strides", "dilations"):
        check_ints(name, given[name], low=1, most=MAX_PIXELS, length=num_stages, why=per_stage)
    stage_blocks = default_blocks
    if given["stage_blocks"] is not None:
        own = given["stage_blocks"]
        stage_blocks = check_ints("stage_blocks", own, low=1, most=MAX_BLOCKS, length=num_stages, why=per_stage)
    if given["multi_grid"] is not None:
        length, why = stage_blocks[num_stages - 1], "one per block of the last stage"
        check_ints("multi_grid", given["multi_grid"], low=1, most=MAX_PIXELS, length=length, why=why)
    resolve_out_indices(given["out_indices"], num_stages)
    check_int("frozen_stages", given["frozen_stages"], low=-1, high=num_stages)


def _check_layer_configs(given: Mapping[str, Any]) -> None:
    check_norm_cfg(given["norm_cfg"], "norm_cfg", in_eval=given["norm_eval"])
    if given["conv_cfg"] is not None:
        check_conv_cfg(given["conv_cfg"], "conv_cfg")
    check_dcn(given["dcn"], given["conv_cfg"])
    num_stages = given["num_stages"]
    length = None if given["dcn"] is None else num_stages
    stages = check_sequence("stage_with_dcn", given["stage_with_dcn"], length=length, why=f"`num_stages`={num_stages}")
    for index, flag in enumerate(stages):
        check_flag(f"stage_with_dcn[{index}]", flag)
    if given["dcn"] is not None and not any(stages):
        warn_user("`dcn` has no effect, as `stage_with_dcn` is False for every stage")


def _check_plugins(plugins: Any, num_stages: int, block: Any) -> None:
    check_plugins(plugins, block)
    for index, plugin in enumerate(plugins or ()):
        if plugin.get("stages") is not None:
            why = f"one per stage, `num_stages`={num_stages}"
            stages = check_sequence(f"plugins[{index}]['stages']", plugin["stages"], length=num_stages, why=why)
            for stage, flag in enumerate(stages):
                check_flag(f"plugins[{index}]['stages'][{stage}]", flag)
    for stage in range(num_stages):
        check_plugin_names(
            [plugin for plugin in plugins or () if plugin.get("stages") is None or plugin["stages"][stage]]
        )
