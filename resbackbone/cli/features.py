"""Compute the feature maps of pictures, for ``resbackbone extract``."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from resbackbone import build_backbone
from resbackbone.backbones import Backbone
from resbackbone.checkpoints import load_checkpoint
from resbackbone.cli.pyramid import Level, draw_pyramid
from resbackbone.config import config_files, load_config
from resbackbone.data.preprocessing import preprocessing_of
from resbackbone.inference import optimize
from resbackbone.necks import FPN
from resbackbone.utils import processor

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
        backend: As for :func:`resbackbone.inference.optimize`, where "auto" falls back on "plain": the net as it is.

    Attributes:
        about: Lines that say where the weights are from, and what the user may not expect.
        title: The weights in a few words, with the config's name.
        in_channels: Of the pictures: 3 for color, 1 for grayscale.
        levels: Name and stride of each output, finest first.
        one_by_one: Whether a batch must be of one picture, because those of a batch would influence each other.
        settings: What the features of a picture depend on, as JSON has it.

    Raises:
        KeyError, TypeError, ValueError, FileNotFoundError: If something does not fit; the message is for the user.
    """

    def __init__(
        self, config: str, *, checkpoint: str | None, device: str, dtype: str, fpn: bool, backend: str = "auto"
    ) -> None:
        check_device(device)
        if dtype == "float16" and backend != "plain" and device == "cpu":
            raise ValueError(
                "`dtype` float16 is not for CPUs; take float32 or bfloat16, or --backend plain for the net as it is"
            )
        backbone_config = load_config(config).backbone
        torch.manual_seed(SEED)
        net = build_backbone(backbone_config)
        self.in_channels = net.in_channels
        name = config if config in config_files() else Path(config).stem
        weights = _configured_weights(backbone_config)
        self.title = f"{name}   {'random weights' if weights is None else Path(weights).name}"
        if checkpoint is not None:
            weights = f"{checkpoint} ({load_checkpoint(net, checkpoint).summary()})"
            self.title = f"{name}   {Path(checkpoint).name}"
        self.preprocessing = preprocessing_of(net)
        self.about = [f"weights: {weights or 'random (no checkpoint given)'}"]
        self.levels = {info.name: info.stride for info in net.feature_info}
        model = self._with_fpn(net) if fpn else net
        self.one_by_one = _mixes_pictures(model)
        self.device = torch.device(device)
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.settings = {
            "config": backbone_config,
            "weights": _digest(model),
            "preprocessing": asdict(self.preprocessing),
            "fpn": fpn,
            "dtype": dtype,
        }
        self.computed_dtype = self._choose_dtype()
        model.to(self.device).eval()
        self.model = self._prepare(model, backend)

    def _with_fpn(self, net: Backbone) -> nn.Module:
        torch.manual_seed(SEED)
        infos = net.feature_info
        num_levels = max(FPN_LEVELS, len(infos))
        fpn = FPN(in_channels=net.out_channels, out_channels=FPN_CHANNELS, num_outs=num_levels)
        fpn.init_weights()
        self.about.append("weights of the FPN: random")
        self.title += "   FPN, random"
        self.levels = {"p0" if info.name == "image" else f"p{info.stage + 2}": info.stride for info in infos}
        for extra in range(1, num_levels - len(infos) + 1):
            self.levels[f"p{infos[-1].stage + 2 + extra}"] = infos[-1].stride * 2**extra
        return nn.Sequential(net, fpn)

    def _choose_dtype(self) -> torch.dtype:
        """Return what to compute in: float32 where a CPU has no instructions for the dtype."""
        computed = processor.computed_dtype(self.dtype) if self.device.type == "cpu" else self.dtype
        if computed is not self.dtype:
            self.settings["computed dtype"] = "float32"
            name = str(self.dtype).removeprefix("torch.")
            reason = f"{processor.reason(self.dtype)}, and would be several times slower in it"
            self.about.append(f"computed in float32 and written in {name}: {reason}")
        return computed

    def _prepare(self, model: nn.Module, backend: Any) -> nn.Module:
        """Return what computes: the model optimized, or as it is in the dtype."""
        self.settings["backend"] = backend
        if backend != "plain":
            try:
                return optimize(model, str(self.computed_dtype).removeprefix("torch."), backend)  # type: ignore[arg-type]
            except ValueError as error:
                if backend != "auto":
                    raise
                self.about.append(f"computed by the plain net: {error}")
        self.settings["backend"] = "plain"
        return model.to(self.computed_dtype)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> list[Features]:
        """Compute the feature maps of pictures, normalized, ``(N, in_channels, H, W)``; one entry for each."""
        outputs = self.model(images.to(self.device, self.computed_dtype))
        outputs = [output.to(self.dtype).cpu() for output in outputs]
        return [
            Features({name: output[index] for name, output in zip(self.levels, outputs, strict=True)}, self.levels)
            for index in range(len(images))
        ]


@dataclass(frozen=True)
class Features:
    """The feature maps of one picture.

    Attributes:
        maps: By the level's name, finest first, ``(C, H, W)`` on the CPU.
        strides: Input pixels per feature pixel of each.
    """

    maps: Mapping[str, Tensor]
    strides: Mapping[str, int]

    @property
    def nbytes(self) -> int:
        """Bytes that the maps take."""
        return sum(tensor.nbytes for tensor in self.maps.values())

    def not_finite(self) -> list[str]:
        """Return the levels that hold an infinity or NaN, which is how half precision overflows."""
        return [name for name, tensor in self.maps.items() if not tensor.isfinite().all()]

    def save_npy(self, path: Path, *, level: str) -> None:
        """Write one level; as float32 if it is bfloat16, which NumPy has not."""
        tensor = self.maps[level]
        with path.open("wb") as file:
            np.save(file, (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).contiguous().numpy())

    def save_safetensors(self, path: Path) -> None:
        """Write all levels into one file, in the dtype that they have."""
        path.write_bytes(to_safetensors({name: tensor.contiguous() for name, tensor in self.maps.items()}))

    def draw(self, picture: Image.Image, *, title: str) -> Image.Image:
        """Draw the overview of the input and every level."""
        levels = [
            Level(name, len(tensor), self.strides[name], tensor.float().abs().mean(0).numpy())
            for name, tensor in self.maps.items()
        ]
        return draw_pyramid(picture, levels=levels, title=title)


def _mixes_pictures(model: nn.Module) -> bool:
    """Whether a norm takes its statistics from the batch in evaluation, too."""
    return any(isinstance(module, _BatchNorm) and module.running_mean is None for module in model.modules())


def _digest(model: nn.Module) -> str:
    """A number that tells these weights from all others."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def available_devices() -> list[str]:
    """The devices that torch can compute on here."""
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    return devices + (["mps"] if torch.backends.mps.is_available() else [])


def check_device(device: str) -> None:
    """Refuse a device that is not among :func:`available_devices`."""
    if device not in (available := available_devices()) and f"{device}:0" not in available:
        raise ValueError(f"device {device!r} is not there; available: {', '.join(available)}")


def _configured_weights(config: Mapping[str, Any]) -> str | None:
    """The checkpoint that the config itself names, if it does."""
    init = config.get("init_cfg")
    for entry in init if isinstance(init, (list, tuple)) else [init]:
        if isinstance(entry, Mapping) and entry.get("type") in ("Pretrained", "PretrainedInit"):
            return f"{entry.get('checkpoint')} (named by the config)"
    return f"{config['pretrained']} (named by the config)" if config.get("pretrained") else None
