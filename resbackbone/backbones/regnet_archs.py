"""The published RegNets, and the widths and depths of stages that follow from a RegNet's parameters."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from resbackbone.layers.arguments import MAX_BLOCKS, MAX_CHANNELS
from resbackbone.utils.validation import UnknownKeyError, check_choice, check_count, check_number, check_type, nearest

Arch = Mapping[str, Any]

REQUIRED = ("w0", "wa", "wm", "group_w", "depth")
OPTIONAL: Arch = {"bot_mul": 1.0, "se_ratio": 0.0, "rounding": "pycls"}
QUANTUM = 8  # widths are multiples of it, before they become whole groups

_RANGES: dict[str, dict[str, Any]] = {
    "wa": {"low": 0},
    "wm": {"low": 1, "above": True},
    "bot_mul": {"low": 0, "above": True},
    "se_ratio": {"low": 0, "high": 1},
}

# Figures 15 (X) and 16 (Y) of arXiv:2003.13678, to the digits of facebookresearch/pycls; names as in mmdet.
ARCHS: dict[str, dict[str, Any]] = {
    "regnetx_200mf": {"w0": 24, "wa": 36.44, "wm": 2.49, "group_w": 8, "depth": 13},
    "regnetx_400mf": {"w0": 24, "wa": 24.48, "wm": 2.54, "group_w": 16, "depth": 22},
    "regnetx_600mf": {"w0": 48, "wa": 36.97, "wm": 2.24, "group_w": 24, "depth": 16},
    "regnetx_800mf": {"w0": 56, "wa": 35.73, "wm": 2.28, "group_w": 16, "depth": 16},
    "regnetx_1.6gf": {"w0": 80, "wa": 34.01, "wm": 2.25, "group_w": 24, "depth": 18},
    "regnetx_3.2gf": {"w0": 88, "wa": 26.31, "wm": 2.25, "group_w": 48, "depth": 25},
    "regnetx_4.0gf": {"w0": 96, "wa": 38.65, "wm": 2.43, "group_w": 40, "depth": 23},
    "regnetx_6.4gf": {"w0": 184, "wa": 60.83, "wm": 2.07, "group_w": 56, "depth": 17},
    "regnetx_8.0gf": {"w0": 80, "wa": 49.56, "wm": 2.88, "group_w": 120, "depth": 23},
    "regnetx_12gf": {"w0": 168, "wa": 73.36, "wm": 2.37, "group_w": 112, "depth": 19},
    "regnetx_16gf": {"w0": 216, "wa": 55.59, "wm": 2.1, "group_w": 128, "depth": 22},
    "regnetx_32gf": {"w0": 320, "wa": 69.86, "wm": 2.0, "group_w": 168, "depth": 23},
    "regnety_200mf": {"w0": 24, "wa": 36.44, "wm": 2.49, "group_w": 8, "depth": 13, "se_ratio": 0.25},
    "regnety_400mf": {"w0": 48, "wa": 27.89, "wm": 2.09, "group_w": 8, "depth": 16, "se_ratio": 0.25},
    "regnety_600mf": {"w0": 48, "wa": 32.54, "wm": 2.32, "group_w": 16, "depth": 15, "se_ratio": 0.25},
    "regnety_800mf": {"w0": 56, "wa": 38.84, "wm": 2.4, "group_w": 16, "depth": 14, "se_ratio": 0.25},
    "regnety_1.6gf": {"w0": 48, "wa": 20.71, "wm": 2.65, "group_w": 24, "depth": 27, "se_ratio": 0.25},
    "regnety_3.2gf": {"w0": 80, "wa": 42.63, "wm": 2.66, "group_w": 24, "depth": 21, "se_ratio": 0.25},
    "regnety_4.0gf": {"w0": 96, "wa": 31.41, "wm": 2.24, "group_w": 64, "depth": 22, "se_ratio": 0.25},
    "regnety_6.4gf": {"w0": 112, "wa": 33.22, "wm": 2.27, "group_w": 72, "depth": 25, "se_ratio": 0.25},
    "regnety_8.0gf": {"w0": 192, "wa": 76.82, "wm": 2.19, "group_w": 56, "depth": 17, "se_ratio": 0.25},
    "regnety_12gf": {"w0": 168, "wa": 73.36, "wm": 2.37, "group_w": 112, "depth": 19, "se_ratio": 0.25},
    "regnety_16gf": {"w0": 200, "wa": 106.23, "wm": 2.48, "group_w": 112, "depth": 18, "se_ratio": 0.25},
    "regnety_32gf": {"w0": 232, "wa": 115.89, "wm": 2.53, "group_w": 232, "depth": 20, "se_ratio": 0.25},
    # Larger than the paper's: SEER's, arXiv:2103.01988, to the digits of timm. torchvision has 128gf, too.
    "regnety_64gf": {"w0": 352, "wa": 147.48, "wm": 2.4, "group_w": 328, "depth": 20, "se_ratio": 0.25},
    "regnety_128gf": {"w0": 456, "wa": 160.83, "wm": 2.52, "group_w": 264, "depth": 27, "se_ratio": 0.25},
    "regnety_256gf": {"w0": 640, "wa": 230.83, "wm": 2.53, "group_w": 373, "depth": 27, "se_ratio": 0.25},
}
# torchvision rounds to whole groups in its own way, which shows in three. The plain names mean the paper's widths, as
# in mmdet, timm and pycls.
ARCHS |= {
    f"{name}_tv": {**ARCHS[name], "rounding": "torchvision"}
    for name in ("regnetx_400mf", "regnety_800mf", "regnety_8.0gf")
}


def resolve_arch(arch: object, archs: Mapping[str, Arch], **overrides: Any) -> dict[str, Any]:
    """Look up and check the description of a RegNet.

    Args:
        arch: A name, or a dict with every entry of ``REQUIRED`` and any of ``OPTIONAL``.
        archs: The descriptions by name.
        overrides: Entries that replace those of ``arch``, unless they are None.

    Returns:
        A new dict with all entries.

    Raises:
        KeyError: If the name is unknown, or an entry is unknown or missing.
        TypeError, ValueError: If ``arch`` is neither name nor dict, or the value of an entry does not fit.
    """
    if isinstance(arch, str):
        if arch not in archs:
            raise UnknownKeyError(f"unknown `arch` {arch!r}" + nearest(arch, archs))
        arch = archs[arch]
    check_type("arch", arch, Mapping, "a name or a dict of w0, wa, wm, group_w and depth")
    assert isinstance(arch, Mapping)
    for key in arch:
        if key not in REQUIRED and key not in OPTIONAL:
            raise UnknownKeyError(f"`arch` has no entry {key!r}" + nearest(key, (*REQUIRED, *OPTIONAL)))
    for key in REQUIRED:
        if key not in arch:
            raise UnknownKeyError(f"`arch` needs {key!r}, got only {', '.join(map(repr, arch)) or 'an empty dict'}")
    settings = {**OPTIONAL, **arch, **{key: value for key, value in overrides.items() if value is not None}}
    _check_values(settings)
    return settings


def _check_values(settings: Arch) -> None:
    for key, low, most in (("w0", QUANTUM, MAX_CHANNELS), ("group_w", 1, MAX_CHANNELS), ("depth", 1, MAX_BLOCKS)):
        check_count(f"arch['{key}']", settings[key], low=low, most=most)
    if settings["w0"] % QUANTUM:
        raise ValueError(f"`arch['w0']` must be a multiple of {QUANTUM}, got {settings['w0']}")
    for key, limits in _RANGES.items():
        if check_number(f"arch['{key}']", settings[key], **limits) > MAX_CHANNELS:
            raise ValueError(f"`arch['{key}']` must be at most {MAX_CHANNELS}, got {settings[key]}")
    check_choice("arch['rounding']", settings["rounding"], ("pycls", "torchvision"))


def plan_stages(settings: Arch) -> tuple[tuple[int, int], ...]:
    """Compute the stages of a RegNet: blocks whose widths follow a line, quantized.

    Args:
        settings: What :func:`resolve_arch` returns.

    Returns:
        The width (output channels) and the number of blocks of each stage.

    Raises:
        ValueError: If there are more than four stages, or one whose 3x3 cannot have whole groups.

    Source: arXiv:2003.13678, equations 2 to 4.

    >>> plan_stages(resolve_arch("regnetx_3.2gf", ARCHS))
    ((96, 2), (192, 6), (432, 15), (1008, 2))
    """
    w0, wa, wm = (settings[key] for key in ("w0", "wa", "wm"))
    line = (w0 + wa * block for block in range(settings["depth"]))
    steps = (round(math.log(width / w0, wm)) for width in line)
    widths = Counter(QUANTUM * round(w0 * wm**step / QUANTUM) for step in steps)
    if len(widths) > 4:
        raise ValueError(
            f"`arch` must make at most 4 stages, got {len(widths)}, of widths {', '.join(map(str, widths))}; "
            "a larger `wm` or a smaller `wa` makes fewer"
        )
    return tuple((_in_whole_groups(width, settings), num_blocks) for width, num_blocks in widths.items())


def _in_whole_groups(width: int, settings: Arch) -> int:
    """Move a stage's width so that its 3x3 consists of whole groups."""
    bot_mul, group_w = settings["bot_mul"], settings["group_w"]
    wished = int(width * bot_mul)
    group_w = min(group_w, wished)
    if group_w == 0:
        raise ValueError(f"`arch['bot_mul']` (={bot_mul}) leaves no channels in the 3x3 of a stage of width {width}")
    if settings["rounding"] == "torchvision":  # ties go up, and no more than a tenth goes away
        middle = (2 * wished + group_w) // (2 * group_w) * group_w
        middle += group_w if middle < 0.9 * wished else 0
    else:
        middle = round(wished / group_w) * group_w
    width = int(middle / bot_mul)
    if round(width * bot_mul) != middle:
        raise ValueError(
            f"`arch['bot_mul']` (={bot_mul}) and `arch['group_w']` (={group_w}) do not go together: "
            f"a stage of width {width} would have {round(width * bot_mul)} channels in its 3x3, not {middle}"
        )
    return width
