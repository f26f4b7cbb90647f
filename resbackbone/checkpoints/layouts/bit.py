"""Key layout of Big Transfer's ``.npz`` files: TensorFlow's names, and kernels (H, W, in, out).

Source: google-research/big_transfer, ``bit_pytorch/models.py``; timm 1.0.31, ``models/resnetv2.py``.
"""

from __future__ import annotations

from resbackbone.checkpoints.layouts.layout import Layout, Tensors
from resbackbone.checkpoints.layouts.table import Table

_BRANCH = "resnet/block{s}/unit{b:unit}/{k:letter}"
_PROJECTION = "resnet/block{s}/unit{b:unit}/a/proj/standardized_conv2d/kernel"

_ROWS = f"""
    conv1.weight                         resnet/root_block/standardized_conv2d/kernel
    layer{{s}}.{{b}}.conv{{k}}.weight      {_BRANCH}/standardized_conv2d/kernel
    layer{{s}}.{{b}}.bn{{k}}.weight        {_BRANCH}/group_norm/gamma
    layer{{s}}.{{b}}.bn{{k}}.bias          {_BRANCH}/group_norm/beta
    layer{{s}}.{{b}}.downsample.0.weight  {_PROJECTION}
    bn.weight                            resnet/group_norm/gamma
    bn.bias                              resnet/group_norm/beta
    fc.weight                            resnet/head/conv2d/kernel
    fc.bias                              resnet/head/conv2d/bias
"""


def _to_torch(tensors: Tensors) -> Tensors:
    """Permute kernels to PyTorch's order, and flatten the classifier, which is a 1x1 convolution there."""
    turned = {name: tensor.permute(3, 2, 0, 1) if tensor.dim() == 4 else tensor for name, tensor in tensors.items()}
    return {name: tensor.flatten(1) if name == "fc.weight" else tensor for name, tensor in turned.items()}


def _to_tensorflow(tensors: Tensors) -> Tensors:
    kernels = {name: tensor[:, :, None, None] if name == "fc.weight" else tensor for name, tensor in tensors.items()}
    return {name: tensor.permute(2, 3, 1, 0) if tensor.dim() == 4 else tensor for name, tensor in kernels.items()}


BIT = Layout(
    "bit", tables=(Table(_ROWS, full_names=True),), values_to_native=_to_torch, values_to_foreign=_to_tensorflow
)
