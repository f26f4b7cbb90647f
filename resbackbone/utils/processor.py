"""Which number formats the CPU computes in hardware, and what to compute in where it does not."""

from __future__ import annotations

import os
import platform

import torch

# Instruction sets without arithmetic in bfloat16, by the names of the variable that limits oneDNN to one of them.
_WITHOUT_BFLOAT16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")


def computes_natively(dtype: torch.dtype) -> bool:
    """Return whether PyTorch multiplies numbers of this dtype with instructions made for it, on this CPU.

    Where it does not, it converts every number in software: a convolution takes several times as long as in float32.
    This is the only place that asks for it.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return True
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if dtype is torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and _has_bfloat16_instructions()


def computed_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return what to compute in on this CPU, where ``dtype`` is asked for: float32 if that is faster."""
    return dtype if computes_natively(dtype) else torch.float32


def reason(dtype: torch.dtype) -> str:
    """Return why not to compute in a dtype on this CPU, as the first clause of a sentence."""
    return f"this processor has no instructions for {str(dtype).removeprefix('torch.')}"


def _has_bfloat16_instructions() -> bool:
    """Return whether oneDNN, which accepts bfloat16 on any AVX-512, has more than conversions for it."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or ""
    if limit.upper() in _WITHOUT_BFLOAT16:
        return False
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True  # there it accepts bfloat16 only with instructions for it
    asked = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # from torch 2.6 on
    return asked is None or bool(asked())
