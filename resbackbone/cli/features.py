"""From a picture to its feature maps, for ``resbackbone extract``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from resbackbone import build_backbone
from resbackbone.backbones import Backbone
from resbackbone.checkpoints import load_checkpoint
from resbackbone.cli.pyramid import Level, draw_pyramid
from resbackbone.config import config_files, load_config
from resbackbone.necks import FPN
from resbackbone.preprocessing import preprocessing_for

SEED = 0  # of random weights: two runs without a checkpoint agree
FPN_CHANNELS, FPN_LEVELS = 256, 5


class Extractor:
    """A backbone, an FPN on top of it if wanted, and the preprocessing that goes with it.

    Args:
        config: A name or path, as for :func:`resbackbone.build_backbone`.
        checkpoint: Weights for the backbone, as for :func:`resbackbone.checkpoints.load_checkpoint`.
        device: A device of :func:`available_devices`.
        dtype: Name of a torch dtype.
        fpn: Whether an FPN's outputs take the place of the backbone's.

    Attributes:
        about_weights: Lines that say where the weights are from.
        title: The same in a few words, with the config's name.

    Raises:
        KeyError, TypeError, ValueError, FileNotFoundError: If something does not fit; the message is for the user.
    """

    def __init__(self, config: str, *, checkpoint: str | None, device: str, dtype: str, fpn: bool) -> None:
        if device not in (available := available_devices()) and f"{device}:0" not in available:
            raise ValueError(f"device {device!r} is not there; available: {', '.join(available)}")
        backbone_config = load_config(config).backbone
        torch.manual_seed(SEED)
        self.net: Backbone = build_backbone(backbone_config)
        self.in_channels = self.net.in_channels
        name = config if config in config_files() else Path(config).stem
        weights = _configured_weights(backbone_config)
        self.title = f"{name}   {'random weights' if weights is None else Path(weights).name}"
        if checkpoint is not None:
            weights = f"{checkpoint} ({load_checkpoint(self.net, checkpoint).summary()})"
            self.title = f"{name}   {Path(checkpoint).name}"
        style = getattr(self.net, "style", "pytorch")
        usual = preprocessing_for(in_channels=self.in_channels, style=style)
        self.preprocessing = self.net.preprocessing or usual
        self.about_weights = [f"weights: {weights or 'random (no checkpoint given)'}"]
        self.levels = {info.name: info.stride for info in self.net.feature_info}
        self.fpn: FPN | None = None
        if fpn:
            self._add_fpn()
        self.device, self.dtype = torch.device(device), getattr(torch, dtype)
        for module in (self.net, self.fpn):
            if module is not None:
                module.to(self.device, self.dtype).eval()

    def _add_fpn(self) -> None:
        torch.manual_seed(SEED)
        self.fpn = FPN(in_channels=self.net.out_channels, out_channels=FPN_CHANNELS, num_outs=FPN_LEVELS)
        self.fpn.init_weights()
        self.about_weights.append("weights of the FPN: random")
        self.title += "   FPN, random"
        infos = self.net.feature_info
        self.levels = {f"p{info.stage + 2}": info.stride for info in infos}
        for extra in range(1, FPN_LEVELS - len(infos) + 1):
            self.levels[f"p{infos[-1].stage + 2 + extra}"] = infos[-1].stride * 2**extra

    @torch.inference_mode()
    def __call__(self, picture: Image.Image) -> Features:
        """Compute the feature maps of a picture of mode "RGB", or "L" for a backbone of one channel."""
        outputs = self.net(self.preprocessing(picture).to(self.device, self.dtype))
        if self.fpn is not None:
            outputs = self.fpn(outputs)
        maps = {name: output[0].cpu().contiguous() for name, output in zip(self.levels, outputs, strict=True)}
        return Features(maps, self.levels)


@dataclass(frozen=True)
class Features:
    """The feature maps of one picture.

    Attributes:
        maps: By the level's name, finest first, ``(C, H, W)`` on the CPU.
        strides: Input pixels per feature pixel of each.
    """

    maps: Mapping[str, Tensor]
    strides: Mapping[str, int]

    def not_finite(self) -> list[str]:
        """Return the levels that hold an infinity or NaN, which is how half precision overflows."""
        return [name for name, tensor in self.maps.items() if not tensor.isfinite().all()]

    def save_npy(self, level: str, path: Path) -> None:
        """Write one level; as float32 if it is bfloat16, which NumPy has not."""
        tensor = self.maps[level]
        with path.open("wb") as file:
            np.save(file, (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy())

    def save_safetensors(self, path: Path) -> None:
        """Write all levels into one file, in the dtype that they have."""
        save_file(dict(self.maps), path)

    def draw(self, picture: Image.Image, *, title: str) -> Image.Image:
        """Draw the overview of the input and every level."""
        levels = [
            Level(name, len(tensor), self.strides[name], tensor.float().abs().mean(0).numpy())
            for name, tensor in self.maps.items()
        ]
        return draw_pyramid(picture, levels=levels, title=title)


def available_devices() -> list[str]:
    """The devices that torch can compute on here."""
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    return devices + (["mps"] if torch.backends.mps.is_available() else [])


def _configured_weights(config: Mapping[str, Any]) -> str | None:
    """The checkpoint that the config itself names, if it does."""
    init = config.get("init_cfg")
    for entry in init if isinstance(init, (list, tuple)) else [init]:
        if isinstance(entry, Mapping) and entry.get("type") in ("Pretrained", "PretrainedInit"):
            return f"{entry.get('checkpoint')} (named by the config)"
    return f"{config['pretrained']} (named by the config)" if config.get("pretrained") else None
