"""Image classifier: a backbone, global average pooling and one linear layer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from mmengine.model import BaseDataPreprocessor, BaseModel
from torch import Tensor, nn

from resbackbone.checkpoints import load_checkpoint
from resbackbone.checkpoints.conversion import find_backbone
from resbackbone.checkpoints.tensors import check_weights, read_tensors
from resbackbone.config import construct_backbone, load_config
from resbackbone.data.preprocessing import Preprocessing, preprocessing_of
from resbackbone.registry import MODELS, register_kind, resolve_type, split_type
from resbackbone.registry.init_cfg import check_init_cfg
from resbackbone.registry.initialization import initialize
from resbackbone.training.classification.losses import CrossEntropy
from resbackbone.training.classification.mixup import MixupCutmix
from resbackbone.training.engine.loop import BatchTooSmallError, is_too_small
from resbackbone.utils.validation import check_choice, check_count, check_mapping, convert_arguments

MAX_CLASSES = 2**20
_PREFIX = "state_dict."  # of the keys in a checkpoint of a run


class DataPreprocessor(BaseDataPreprocessor):
    """Moves batches to the model's device and normalizes images.

    Mean, standard deviation and channel order are buffers, so that a checkpoint contains them.

    Args:
        preprocessing: The normalization that the weights expect.
    """

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        channels = len(preprocessing.mean)
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("std", torch.ones(channels, 1, 1))
        self.register_buffer("channels", torch.arange(channels))
        self.set_preprocessing(preprocessing)

    def set_preprocessing(self, preprocessing: Preprocessing) -> None:
        """Change the normalization, for other weights.

        Raises:
            ValueError: If the number of channels differs.
        """
        channels = list(range(len(preprocessing.mean)))
        if len(channels) != len(self.channels):
            raise ValueError(f"images have {len(self.channels)} channels, but `preprocessing` is for {len(channels)}")
        self.mean.copy_(torch.tensor(preprocessing.mean)[:, None, None])
        self.std.copy_(torch.tensor(preprocessing.std)[:, None, None])
        self.channels.copy_(torch.tensor(channels[::-1] if preprocessing.order == "BGR" else channels))

    def forward(self, data: Mapping[str, Any], training: bool = False) -> dict[str, Any]:
        """Normalize the ``inputs`` of a batch, ``(N, C, H, W)``, RGB, 0-255; other entries are only moved."""
        batch = dict(self.cast_data(data))
        images = batch["inputs"].index_select(1, self.channels)
        return {**batch, "inputs": (images - self.mean) / self.std}


@register_kind("classifier")
@MODELS.register_module()
class ImageClassifier(BaseModel):
    """Image classifier.

    State dict keys are those of the backbone with the prefix ``backbone.``, and ``fc.weight`` and ``fc.bias`` as in
    torchvision.

    Args:
        backbone: A name of :func:`~resbackbone.list_backbones`, a file or a dict, as for
            :func:`~resbackbone.build_backbone`. Its last output is used. ``norm_eval`` defaults to False here, unlike
            in detection.
        num_classes: Number of classes.
        loss: Config of a loss of logits ``(N, K)`` and targets ``(N, K)``; default: cross-entropy.
        mixup_cutmix: Arguments of :class:`~resbackbone.training.classification.mixup.MixupCutmix`, for training.
        preprocessing: Arguments of :class:`~resbackbone.data.preprocessing.Preprocessing`; None for that of the
            backbone's pretrained weights, or ImageNet's default without them.
        init_cfg: As for mmengine's ``BaseModule``. Set pretrained backbone weights in the backbone's own ``init_cfg``.

    Attributes:
        classes: Class names in the order of the outputs, from the checkpoint that :meth:`load_weights` loaded; None if
            it has none.
    """

    @convert_arguments
    def __init__(
        self,
        backbone: str | Path | Mapping[str, Any],
        *,
        num_classes: int,
        loss: Mapping[str, Any] | None = None,
        mixup_cutmix: Mapping[str, Any] | None = None,
        preprocessing: Mapping[str, Any] | None = None,
        init_cfg: Any = None,
    ) -> None:
        check_count("num_classes", num_classes, most=MAX_CLASSES)
        check_mapping("loss", loss)
        check_mapping("mixup_cutmix", mixup_cutmix)
        check_mapping("preprocessing", preprocessing)
        check_init_cfg(init_cfg)
        loss_module = _build_loss(loss)
        batch_augment = None if mixup_cutmix is None else MixupCutmix(**mixup_cutmix)
        given = None if preprocessing is None else Preprocessing(**preprocessing)
        net = construct_backbone({"norm_eval": False, **load_config(backbone).backbone})
        super().__init__(DataPreprocessor(given or preprocessing_of(net)), init_cfg)
        self.backbone = net
        self.fc = nn.Linear(net.out_channels[-1], num_classes)
        self.num_classes = num_classes
        self.classes: tuple[str, ...] | None = None
        self.loss = loss_module
        self.mixup_cutmix = batch_augment
        self._preprocessing_from_weights = given is None

    def init_weights(self) -> None:
        """Initialize the weights, and use the preprocessing of pretrained ones."""
        initialize(self, super().init_weights)
        self._update_preprocessing()

    def load_weights(self, source: str | Path) -> None:
        """Load the weights of backbone and ``fc``, from a run of this library or a third-party classifier checkpoint.

        Args:
            source: As for :func:`~resbackbone.checkpoints.load_checkpoint`.

        Raises:
            FileNotFoundError, KeyError, OSError: If the file or name does not exist, or a download fails.
            ValueError: If the checkpoint is damaged or does not fit the model.
        """
        content = read_tensors(source)
        own = {name.removeprefix(_PREFIX): value for name, value in content.tensors.items() if name.startswith(_PREFIX)}
        from_run = "data_preprocessor.channels" in own
        if not from_run:
            native = find_backbone(content.tensors, from_mmengine=content.from_mmengine).native
            own = {name: native[name] for name in ("fc.weight", "fc.bias") if name in native}
        self._check_fit(own, source, complete=from_run)
        if not from_run:
            load_checkpoint(self.backbone, source)
            self._update_preprocessing()
        self.load_state_dict(own, strict=from_run)
        # Only of a run of this library: class names of other checkpoints are not the names of picture folders.
        has_names = from_run and len(content.classes or ()) == self.num_classes
        self.classes = content.classes if has_names else None

    def _check_fit(self, tensors: Mapping[str, Tensor], source: str | Path, *, complete: bool) -> None:
        """Raise unless the keys and shapes are those of the model, or without ``complete`` those of ``fc``."""
        expected = {
            name: tuple(tensor.shape) for name, tensor in self.state_dict().items() if complete or name[:3] == "fc."
        }
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        wrong = [name for name in (*expected, *found) if expected.get(name) != found.get(name)]
        if wrong:
            raise ValueError(
                f"{str(source)!r} does not fit the model, nothing was loaded: {wrong[0]} is "
                f"{found.get(wrong[0], 'missing')} instead of {expected.get(wrong[0], 'absent')}, "
                f"{len(set(wrong)) - 1} more; check `num_classes` and `backbone`"
            )
        check_weights(tensors)

    def _update_preprocessing(self) -> None:
        if self._preprocessing_from_weights and self.backbone.preprocessing is not None:
            self.data_preprocessor.set_preprocessing(self.backbone.preprocessing)

    @overload
    def forward(self, inputs: Tensor, labels: Tensor | None = None, mode: Literal["tensor"] = "tensor") -> Tensor: ...

    @overload
    def forward(self, inputs: Tensor, labels: Tensor, mode: Literal["loss"]) -> dict[str, Tensor]: ...

    @overload
    def forward(self, inputs: Tensor, labels: Tensor | None, mode: Literal["predict"]) -> list[dict[str, Tensor]]: ...

    def forward(self, inputs: Tensor, labels: Tensor | None = None, mode: str = "tensor") -> Any:
        """Classify images.

        Args:
            inputs: ``(N, C, H, W)``, normalized.
            labels: ``(N,)``, class indices; needed for the loss only.
            mode: "tensor", "loss" or "predict".

        Returns:
            For "tensor", logits ``(N, num_classes)``; for "loss", a dict with ``loss``; for "predict", a list with one
            dict per image, with its logits as ``scores``, ``(num_classes,)``.
        """
        check_choice("mode", mode, ("tensor", "loss", "predict"))
        if mode == "loss":
            if labels is None:
                raise TypeError("mode='loss' needs `labels`, got None")
            targets = F.one_hot(labels, self.num_classes).to(inputs.dtype)
            if self.mixup_cutmix is not None:
                inputs, targets = self.mixup_cutmix(inputs, targets)
            return {"loss": self.loss(self._logits(inputs), targets)}
        logits = self._logits(inputs)
        return logits if mode == "tensor" else [{"scores": scores} for scores in logits]

    def _logits(self, inputs: Tensor) -> Tensor:
        try:
            features = self.backbone(inputs)[-1]
        except ValueError as error:
            if not is_too_small(error):
                raise
            raise BatchTooSmallError(
                f"images {tuple(inputs.shape)} give feature maps of one pixel, a single value per channel, but batch "
                "norm needs two: drop_last=True of the data loader drops a last batch of one; or choose another "
                "batch_size, or larger pictures"
            ) from error
        logits: Tensor = self.fc(features.mean((2, 3)))
        return logits


def _build_loss(cfg: Mapping[str, Any] | None) -> nn.Module:
    """Build the loss; errors name the argument."""
    if cfg is None:
        return CrossEntropy()
    try:
        resolve_type(split_type(cfg, "loss")[0], "loss")
        loss: nn.Module = MODELS.build(dict(cfg))
    except (KeyError, TypeError, ValueError) as error:
        raise type(error)(f"`loss` {dict(cfg)!r}: {error.args[0]}") from error
    return loss
