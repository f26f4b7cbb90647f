"""Hardware support of the CPU for bfloat16 and float16."""

from __future__ import annotations

import os
import platform

import torch

# Values of oneDNN's ISA limit (ONEDNN_MAX_CPU_ISA) without bfloat16 arithmetic.
_WITHOUT_BFLOAT16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")


def computes_natively(dtype: torch.dtype) -> bool:
    """Return whether this CPU has instructions for a dtype, so that PyTorch does not emulate it.

    Without them, PyTorch converts every value in software, and a convolution is several times slower than in float32.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return True
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if dtype is torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and _has_bfloat16_instructions()


def computed_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to compute in on this CPU: ``dtype``, or float32 if ``dtype`` would be emulated."""
    return dtype if computes_natively(dtype) else torch.float32


def reason(dtype: torch.dtype) -> str:
    """Return the reason why a dtype is not used on this CPU, as a clause for messages."""
    return f"this processor has no instructions for {str(dtype).removeprefix('torch.')}"


def _has_bfloat16_instructions() -> bool:
    """Return whether oneDNN has bfloat16 arithmetic; on AVX-512 alone it accepts bfloat16 but only converts."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or ""
    if limit.upper() in _WITHOUT_BFLOAT16:
        return False
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True  # on other architectures it accepts bfloat16 only with hardware support
    asked = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # since torch 2.6
    return asked is None or bool(asked())
