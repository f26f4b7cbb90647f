"""The model that extracts features: preprocessing, backbone, optional FPN, and the feature maps of one picture."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from resbackbone.backbones import Backbone
from resbackbone.checkpoints import load_checkpoint
from resbackbone.config import BackboneSource, build_backbone, config_files, load_config
from resbackbone.data.preprocessing import preprocessing_of
from resbackbone.extraction.visualization import Level, draw_pyramid
from resbackbone.inference import optimize
from resbackbone.necks import FPN
from resbackbone.utils import processor
from resbackbone.utils.devices import check_device
from resbackbone.utils.validation import check_choice

Dtype = Literal["float32", "bfloat16", "float16", "float64"]
Backend = Literal["auto", "onednn", "compile", "eager", "plain"]
SEED = 0  # of random weights: runs without a checkpoint agree
FPN_CHANNELS, FPN_LEVELS = 256, 5


class Extractor:
    """A backbone with its preprocessing, and an FPN on top if wanted: images in, feature maps out.

    Args:
        config: As for :func:`resbackbone.build_backbone`.
        checkpoint: Weights of the backbone, as for :func:`resbackbone.checkpoints.load_checkpoint`.
        device: One of :func:`resbackbone.utils.devices.available_devices`.
        dtype: "float32", "bfloat16", "float16" or "float64".
        fpn: Whether to return the outputs of an FPN instead of the backbone's.
        backend: As for :func:`resbackbone.inference.optimize`, where "auto" falls back to "plain": the model unchanged.

    Attributes:
        notes: Lines for the user: the source of the weights, fallbacks of the dtype and the backend.
        title: Name of the config and of the weights.
        in_channels: Of the pictures: 3 for color, 1 for grayscale.
        levels: Stride of each output by its name, finest first.
        uses_batch_statistics: Whether a norm normalizes over the batch in eval mode, so that images affect each other.
        settings: Everything but the picture that the features depend on, as JSON values.

    Raises:
        KeyError, TypeError, ValueError, OSError: As :func:`extract` does.
    """

    def __init__(
        self,
        config: BackboneSource,
        *,
        checkpoint: str | Path | None = None,
        device: str = "cpu",
        dtype: Dtype = "float32",
        fpn: bool = False,
        backend: Backend = "auto",
    ) -> None:
        check_choice("dtype", dtype, get_args(Dtype))
        check_choice("backend", backend, get_args(Backend))
        check_device(device)
        if dtype == "float16" and backend != "plain" and device == "cpu":
            raise ValueError(
                "`dtype` float16 is not for CPUs; use float32 or bfloat16, or backend 'plain', the model unchanged"
            )
        backbone_config = load_config(config).backbone
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(SEED)
            net = build_backbone(backbone_config)
        self.in_channels = net.in_channels
        weights = _configured_weights(backbone_config)
        weights_name = "random weights" if weights is None else Path(weights).name
        if checkpoint is not None:
            weights = f"{checkpoint} ({load_checkpoint(net, checkpoint).summary()})"
            weights_name = Path(checkpoint).name
        self.title = f"{_config_name(config)}   {weights_name}"
        self.preprocessing = preprocessing_of(net)
        self.notes = [f"weights: {weights or 'random (no checkpoint given)'}"]
        self.levels = {info.name: info.stride for info in net.feature_info}
        model = self._add_fpn(net) if fpn else net
        self.uses_batch_statistics = _uses_batch_statistics(model)
        self.device = torch.device(device)
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.settings = {
            "config": backbone_config,
            "weights": _digest(model),
            "preprocessing": asdict(self.preprocessing),
            "fpn": fpn,
            "dtype": dtype,
        }
        self.computed_dtype = self._choose_computed_dtype()
        model.to(self.device).eval()
        self.model = self._optimize(model, backend)

    def _add_fpn(self, net: Backbone) -> nn.Module:
        infos = net.feature_info
        num_levels = max(FPN_LEVELS, len(infos))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(SEED)
            fpn = FPN(in_channels=net.out_channels, out_channels=FPN_CHANNELS, num_outs=num_levels)
            fpn.init_weights()
        self.notes.append("weights of the FPN: random")
        self.title += "   FPN, random"
        self.levels = {"p0" if info.name == "image" else f"p{info.stage + 2}": info.stride for info in infos}
        for extra in range(1, num_levels - len(infos) + 1):
            self.levels[f"p{infos[-1].stage + 2 + extra}"] = infos[-1].stride * 2**extra
        return nn.Sequential(net, fpn)

    def _choose_computed_dtype(self) -> torch.dtype:
        """Return the dtype to compute in: float32 where a CPU has no instructions for the one asked for."""
        computed = processor.computed_dtype(self.dtype) if self.device.type == "cpu" else self.dtype
        if computed is not self.dtype:
            self.settings["computed dtype"] = "float32"
            name = str(self.dtype).removeprefix("torch.")
            reason = f"{processor.reason(self.dtype)}, and would be several times slower in it"
            self.notes.append(f"computed in float32 and written in {name}: {reason}")
        return computed

    def _optimize(self, model: nn.Module, backend: Backend) -> nn.Module:
        """Return the model optimized; with backend "plain", or where "auto" cannot optimize it, converted only."""
        self.settings["backend"] = backend
        if backend != "plain":
            try:
                return optimize(model, str(self.computed_dtype).removeprefix("torch."), backend)  # type: ignore[arg-type]
            except ValueError as error:
                if backend != "auto":
                    raise
                self.notes.append(f"computed by the plain net: {error}")
        self.settings["backend"] = "plain"
        return model.to(self.computed_dtype)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> list[Features]:
        """Compute feature maps.

        Args:
            images: Normalized by ``preprocessing``, ``(N, in_channels, H, W)``.

        Returns:
            The feature maps of each image, on the CPU.
        """
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
        maps: By name of the level, finest first; each ``(C, H, W)`` on the CPU.
        strides: Stride of each level in input pixels.
    """

    maps: Mapping[str, Tensor]
    strides: Mapping[str, int]

    @property
    def nbytes(self) -> int:
        """Size of the maps in bytes."""
        return sum(tensor.nbytes for tensor in self.maps.values())

    def non_finite(self) -> list[str]:
        """Return the levels that contain an infinity or NaN, as when half precision overflows."""
        return [name for name, tensor in self.maps.items() if not tensor.isfinite().all()]

    def save_npy(self, path: Path, *, level: str) -> None:
        """Write one level; bfloat16 is written as float32, since NumPy has no bfloat16."""
        tensor = self.maps[level]
        with path.open("wb") as file:
            np.save(file, (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).contiguous().numpy())

    def save_safetensors(self, path: Path) -> None:
        """Write all levels into one file, in their own dtype."""
        path.write_bytes(to_safetensors({name: tensor.contiguous() for name, tensor in self.maps.items()}))

    def draw(self, picture: Image.Image, *, title: str) -> Image.Image:
        """Draw an overview of the picture and every level."""
        levels = [
            Level(name, len(tensor), self.strides[name], tensor.float().abs().mean(0).numpy())
            for name, tensor in self.maps.items()
        ]
        return draw_pyramid(picture, levels=levels, title=title)


def _uses_batch_statistics(model: nn.Module) -> bool:
    return any(isinstance(module, _BatchNorm) and module.running_mean is None for module in model.modules())


def _digest(model: nn.Module) -> str:
    """Return a hash of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _config_name(config: BackboneSource) -> str:
    if isinstance(config, Mapping):
        return str(config.get("type"))
    return str(config) if str(config) in config_files() else Path(config).stem


def _configured_weights(config: Mapping[str, Any]) -> str | None:
    """Return the checkpoint that the config itself names, if any."""
    init = config.get("init_cfg")
    for entry in init if isinstance(init, (list, tuple)) else [init]:
        if isinstance(entry, Mapping) and entry.get("type") in ("Pretrained", "PretrainedInit"):
            return f"{entry.get('checkpoint')} (named by the config)"
    return f"{config['pretrained']} (named by the config)" if config.get("pretrained") else None
