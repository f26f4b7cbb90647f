"""Key layout of Detectron's pickles of Caffe2 blobs, MSRA's weights among them.

Their batch norms are one multiplication and one addition. Ours divide by the root of variance plus 1e-5, so that a mean
of 0 and a variance of 1 - 1e-5 are equivalent.

Source: facebookresearch/Detectron, ``detectron/modeling/ResNet.py``; the names that detectron2 reads besides in
``checkpoint/c2_model_loading.py``.
"""

from __future__ import annotations

import re

import torch

from resbackbone.checkpoints.layouts.layout import Layout, Tensors
from resbackbone.checkpoints.layouts.table import Table

_EPS = 1e-5  # of every batch norm here


def _rows(norm: str) -> str:
    """Return the rows of the table for nets with batch norms ("bn") or group norms ("gn")."""
    rows = [("conv1.weight", "conv1_w"), ("fc.weight", "pred_w"), ("fc.bias", "pred_b")]
    first = "res_conv1_bn" if norm == "bn" else "conv1_gn"
    block, branch = "layer{s}.{b}.", "res{s+1}_{b}_branch"
    rows += [(f"{block}conv{{k}}.weight", f"{branch}2{{k:letter}}_w"), (f"{block}downsample.0.weight", f"{branch}1_w")]
    for ours, theirs in (("weight", "s"), ("bias", "b"), ("running_mean", "rm"), ("running_var", "riv")):
        rows += [
            (f"{norm}1.{ours}", f"{first}_{theirs}"),
            (f"{block}{norm}{{k}}.{ours}", f"{branch}2{{k:letter}}_{norm}_{theirs}"),
            (f"{block}downsample.1.{ours}", f"{branch}1_{norm}_{theirs}"),
        ]
    return "\n".join(f"{ours} {theirs}" for ours, theirs in rows)


def _clean(tensors: Tensors) -> Tensors:
    """Drop states of the training, and replace older names."""
    cleaned = {}
    for name, tensor in tensors.items():
        if name.endswith("_momentum") or name in ("lr", "weight_order"):
            continue
        for old, new in (("gamma", "s"), ("beta", "b"), ("running_mean", "rm"), ("running_var", "riv")):
            name = re.sub(rf"_(bn|gn)_{old}$", rf"_\1_{new}", name)
        cleaned[re.sub(r"^conv1_bn_", "res_conv1_bn_", re.sub(r"^fc1000_", "pred_", name))] = tensor
    return cleaned


def _add_statistics(tensors: Tensors) -> Tensors:
    """Add the mean and variance of an identity to batch norms without statistics."""
    complete = {}
    for name, tensor in tensors.items():
        complete[name] = tensor
        norm = name.removesuffix(".bias")
        if norm != name and _is_batch_norm(norm, tensors) and f"{norm}.running_mean" not in tensors:
            complete[f"{norm}.running_mean"] = torch.zeros_like(tensor)
            complete[f"{norm}.running_var"] = torch.full_like(tensor, 1 - _EPS)
    return complete


def _is_batch_norm(module: str, tensors: Tensors) -> bool:
    grouped = any(name.startswith("gn1.") for name in tensors)
    return not grouped and re.search(r"(^|\.)bn\d$|downsample\.1$", module) is not None


def _fold_statistics(tensors: Tensors) -> Tensors:
    """Fold the statistics of each batch norm into its weight and bias."""
    folded = {}
    for name, tensor in tensors.items():
        module, _, parameter = name.rpartition(".")
        if f"{module}.running_var" not in tensors:
            folded[name] = tensor
        elif parameter in ("weight", "bias"):
            mean, var = (tensors[f"{module}.running_{statistic}"].double() for statistic in ("mean", "var"))
            scale = tensors[f"{module}.weight"].double() / (var + _EPS).sqrt()
            folded[name] = (scale if parameter == "weight" else tensor.double() - mean * scale).to(tensor.dtype)
    return folded


CAFFE2 = Layout(
    "caffe2",
    tables=(Table(_rows("bn"), full_names=True), Table(_rows("gn"), full_names=True)),
    clean=_clean,
    values_to_native=_add_statistics,
    values_to_foreign=_fold_statistics,
)
