"""Loading a file of native weights into a backbone: all of it or nothing, with a report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from resbackbone.layers.deform_conv import rename_old_offsets


@dataclass(frozen=True)
class LoadReport:
    """What became of a checkpoint.

    Attributes:
        layout: How its keys were named.
        loaded: Keys of the model that were filled.
        missing: Keys of the model that the checkpoint does not have.
        unexpected: Keys of the checkpoint that the model does not have, its classifier's among them.
        mismatched: Keys whose shapes differ, with both shapes.
    """

    layout: str
    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]

    def __str__(self) -> str:
        """Count each kind in one line."""
        return (
            f"{len(self.loaded)} tensors loaded ({self.layout} keys), {len(self.missing)} missing, "
            f"{len(self.unexpected)} unexpected, {len(self.mismatched)} of another shape"
        )


def load_checkpoint(net: nn.Module, source: str | Path) -> LoadReport:
    """Load weights whose keys are the native ones, which are torchvision's, or those of a whole detector's backbone.

    Args:
        net: The backbone. It changes only if every one of its tensors is in the file with the right shape.
        source: A ``.pth``, ``.pt`` or ``.safetensors`` file. Nothing in it is executed (``weights_only``).

    Returns:
        What was loaded, and what in the file was left over (a classifier, heads).

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged or holds anything but tensors and plain values; or a tensor of the backbone
            is missing or has another shape, which the error lists.
    """
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {str(path)!r}; give the path of a .pth, .pt or .safetensors file")
    layout, tensors = _strip(_read(path))
    rename_old_offsets(net, tensors)
    own = net.state_dict()
    # Counters that old files lack; they influence nothing.
    optional = {key for key in own if key.endswith("num_batches_tracked")}
    report = LoadReport(
        layout=layout,
        loaded=tuple(key for key in own if key in tensors),
        missing=tuple(key for key in own if key not in tensors and key not in optional),
        unexpected=tuple(key for key in tensors if key not in own),
        mismatched=tuple(
            f"{key} {tuple(tensors[key].shape)} for {tuple(own[key].shape)}"
            for key in own
            if key in tensors and tensors[key].shape != own[key].shape
        ),
    )
    if report.missing or report.mismatched:
        worst = [*report.mismatched, *report.missing][:5]
        raise ValueError(
            f"{str(path)!r} does not fit {type(net).__name__}, nothing was changed: {report}: {', '.join(worst)}"
        )
    net.load_state_dict({key: tensors[key] for key in report.loaded}, strict=False)
    return report


def _read(path: Path) -> Mapping[str, Any]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (
        Exception
    ) as error:  # what a damaged or hostile file makes zip, pickle and safetensors raise is of many kinds
        raise ValueError(f"{str(path)!r} cannot be read as weights alone: {error}") from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise ValueError(f"{str(path)!r} holds no state dict but a {type(content).__name__}")
    return content


def _strip(content: Mapping[str, Any]) -> tuple[str, dict[str, Tensor]]:
    """Keep the tensors, and of a whole detector or segmentor those of its backbone, without the prefix."""
    tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    prefix = "backbone."
    if any(key.startswith(prefix) for key in tensors):
        inside = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        outside = {key: value for key, value in tensors.items() if not key.startswith(prefix)}
        return "mmdet", {**outside, **inside}
    return "native", tensors
