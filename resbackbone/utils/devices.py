"""The devices of this machine that PyTorch computes on."""

from __future__ import annotations

import torch


def available_devices() -> list[str]:
    """Return the names of all available devices, such as "cpu" and "cuda:0"."""
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    return devices + (["mps"] if torch.backends.mps.is_available() else [])


def check_device(device: str) -> None:
    """Raise ValueError unless a device is one of :func:`available_devices`; "cuda" stands for the first GPU."""
    if device not in (available := available_devices()) and f"{device}:0" not in available:
        raise ValueError(f"device {device!r} is not there; available: {', '.join(available)}")
