"""The image classifier: a backbone, global average pooling and one linear layer."""

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
from resbackbone.training.classification.mixup import Mixing
from resbackbone.training.engine.loop import BatchTooSmall, is_too_small
from resbackbone.utils.validation import check_choice, check_count, check_mapping, convert_arguments

MOST_CLASSES = 2**20
_WRAPPING = "state_dict."  # of a run's checkpoint


class Normalize(BaseDataPreprocessor):
    """Takes batches to the model's device, and pictures to what the weights expect.

    Its numbers are in the state dict, so that a checkpoint says what its weights were trained with.

    Args:
        preprocessing: What they expect.
    """

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        channels = len(preprocessing.mean)
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("std", torch.ones(channels, 1, 1))
        self.register_buffer("channels", torch.arange(channels))
        self.adopt(preprocessing)

    def adopt(self, preprocessing: Preprocessing) -> None:
        """Change to what other weights expect.

        Raises:
            ValueError: If that is another number of channels.
        """
        channels = list(range(len(preprocessing.mean)))
        if len(channels) != len(self.channels):
            raise ValueError(f"pictures have {len(self.channels)} channels, `preprocessing` is for {len(channels)}")
        self.mean.copy_(torch.tensor(preprocessing.mean)[:, None, None])
        self.std.copy_(torch.tensor(preprocessing.std)[:, None, None])
        self.channels.copy_(torch.tensor(channels[::-1] if preprocessing.order == "BGR" else channels))

    def forward(self, data: Mapping[str, Any], training: bool = False) -> dict[str, Any]:
        """Normalize the ``inputs`` of a batch, ``(N, C, H, W)``, RGB, 0-255; the rest goes with them."""
        batch = dict(self.cast_data(data))
        pictures = batch["inputs"].index_select(1, self.channels)
        return {**batch, "inputs": (pictures - self.mean) / self.std}


@register_kind("classifier")
@MODELS.register_module()
class ImageClassifier(BaseModel):
    """Classifies pictures.

    Its tensors are the backbone's below ``backbone.``, and ``fc.weight`` and ``fc.bias`` as in torchvision.

    Args:
        backbone: A name of :func:`~resbackbone.list_backbones`, a file or a dict, as for
            :func:`~resbackbone.build_backbone`. Its last output counts. Where it does not say ``norm_eval``, it is
            False, other than in detection.
        num_classes: How many classes.
        loss: Config of a loss of logits ``(N, K)`` against targets ``(N, K)``; cross-entropy unless given.
        mixing: Arguments of :class:`~resbackbone.training.classification.mixup.Mixing`, for training.
        preprocessing: Arguments of :class:`~resbackbone.data.preprocessing.Preprocessing`; None for what the backbone's
            pretrained weights expect, or without such the usual.
        init_cfg: As for mmengine's ``BaseModule``. Pretrained weights of the backbone are better named in its own.

    Attributes:
        classes: Names of the classes in the order of the outputs, from the checkpoint that :meth:`load_weights` has
            read; None where it does not say.
    """

    @convert_arguments
    def __init__(
        self,
        backbone: str | Path | Mapping[str, Any],
        *,
        num_classes: int,
        loss: Mapping[str, Any] | None = None,
        mixing: Mapping[str, Any] | None = None,
        preprocessing: Mapping[str, Any] | None = None,
        init_cfg: Any = None,
    ) -> None:
        check_count("num_classes", num_classes, most=MOST_CLASSES)
        check_mapping("loss", loss)
        check_mapping("mixing", mixing)
        check_mapping("preprocessing", preprocessing)
        check_init_cfg(init_cfg)
        loss_module = _build_loss(loss)
        mixer = None if mixing is None else Mixing(**mixing)
        given = None if preprocessing is None else Preprocessing(**preprocessing)
        net = construct_backbone({"norm_eval": False, **load_config(backbone).backbone})
        usual = given or preprocessing_of(net)
        super().__init__(Normalize(usual), init_cfg)
        self.backbone = net
        self.fc = nn.Linear(net.out_channels[-1], num_classes)
        self.num_classes = num_classes
        self.classes: tuple[str, ...] | None = None
        self.loss = loss_module
        self.mixing = mixer
        self._follows_weights = given is None

    def init_weights(self) -> None:
        """Initialize the weights, and take over what pretrained ones expect of a picture."""
        initialize(self, super().init_weights)
        self._follow_weights()

    def load_weights(self, source: str | Path) -> None:
        """Load all weights, of backbone and ``fc``: of a run of this library, or of a third party that publishes both.

        Args:
            source: As for :func:`~resbackbone.checkpoints.load_checkpoint`.

        Raises:
            FileNotFoundError, KeyError, OSError: If there is no such file or name, or a download fails.
            ValueError: If it is damaged or does not fit.
        """
        content = read_tensors(source)
        own = {
            name.removeprefix(_WRAPPING): value for name, value in content.tensors.items() if name.startswith(_WRAPPING)
        }
        of_a_run = "data_preprocessor.channels" in own
        if not of_a_run:
            native = find_backbone(content.tensors, from_mmengine=content.from_mmengine).native
            own = {name: native[name] for name in ("fc.weight", "fc.bias") if name in native}
        self._check_fit(own, source, whole=of_a_run)
        if not of_a_run:
            load_checkpoint(self.backbone, source)
            self._follow_weights()
        self.load_state_dict(own, strict=of_a_run)
        # Only of a run of this library: others name their classes otherwise than the folders of their pictures.
        named = of_a_run and len(content.classes or ()) == self.num_classes
        self.classes = content.classes if named else None

    def _check_fit(self, tensors: Mapping[str, Tensor], source: str | Path, *, whole: bool) -> None:
        """Raise unless these are all tensors of the model, or else of the classifier, in the right shapes."""
        expected = {
            name: tuple(tensor.shape) for name, tensor in self.state_dict().items() if whole or name[:3] == "fc."
        }
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        wrong = [name for name in (*expected, *found) if expected.get(name) != found.get(name)]
        if wrong:
            raise ValueError(
                f"{str(source)!r} does not fit, nothing was changed: {wrong[0]} is "
                f"{found.get(wrong[0], 'not there')} for {expected.get(wrong[0], 'none')}, {len(set(wrong)) - 1} more; "
                "are `num_classes` and `backbone` those of the weights?"
            )
        check_weights(tensors)

    def _follow_weights(self) -> None:
        if self._follows_weights and self.backbone.preprocessing is not None:
            self.data_preprocessor.adopt(self.backbone.preprocessing)

    @overload
    def forward(self, inputs: Tensor, labels: Tensor | None = None, mode: Literal["tensor"] = "tensor") -> Tensor: ...

    @overload
    def forward(self, inputs: Tensor, labels: Tensor, mode: Literal["loss"]) -> dict[str, Tensor]: ...

    @overload
    def forward(self, inputs: Tensor, labels: Tensor | None, mode: Literal["predict"]) -> list[dict[str, Tensor]]: ...

    def forward(self, inputs: Tensor, labels: Tensor | None = None, mode: str = "tensor") -> Any:
        """Classify pictures.

        Args:
            inputs: ``(N, C, H, W)``, normalized.
            labels: ``(N,)``, integers from 0; only losses need them.
            mode: "tensor", "loss" or "predict".

        Returns:
            For "tensor" logits, ``(N, num_classes)``; for "loss" a dict with ``loss``; for "predict" a list of dicts,
            one for each picture, with its ``scores``, ``(num_classes,)``: the logits.
        """
        check_choice("mode", mode, ("tensor", "loss", "predict"))
        if mode == "loss":
            if labels is None:
                raise TypeError("a loss needs `labels`, got None")
            targets = F.one_hot(labels, self.num_classes).to(inputs.dtype)
            if self.mixing is not None:
                inputs, targets = self.mixing(inputs, targets)
            return {"loss": self.loss(self._logits(inputs), targets)}
        logits = self._logits(inputs)
        return logits if mode == "tensor" else [{"scores": scores} for scores in logits]

    def _logits(self, inputs: Tensor) -> Tensor:
        try:
            features = self.backbone(inputs)[-1]
        except ValueError as error:
            if not is_too_small(error):
                raise
            raise BatchTooSmall(
                f"images {tuple(inputs.shape)} come to maps of one pixel, a single value per channel where batch norm "
                "needs two: drop_last=True of the data loader leaves out a last batch of one; or choose another "
                "batch_size, or larger pictures"
            ) from error
        logits: Tensor = self.fc(features.mean((2, 3)))
        return logits


def _build_loss(cfg: Mapping[str, Any] | None) -> nn.Module:
    """Build the loss, before a net is built; errors name the argument."""
    if cfg is None:
        return CrossEntropy()
    try:
        resolve_type(split_type(cfg, "loss")[0], "loss")
        loss: nn.Module = MODELS.build(dict(cfg))
    except (KeyError, TypeError, ValueError) as error:
        raise type(error)(f"`loss` {dict(cfg)!r}: {error.args[0]}") from error
    return loss
