"""A CPU without instructions for a number format computes in float32, and says so, at every door that takes a dtype."""

import json
import os
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from command_line import make_picture, run
from safetensors.torch import load_file
from torch import nn

from resbackbone import ResNet
from resbackbone.analysis import benchmark
from resbackbone.inference import export, optimize, quantize
from resbackbone.necks import FPN
from resbackbone.utils import processor

SLOW = "has no instructions for bfloat16"


@pytest.fixture
def net(randomize_norms):
    return randomize_norms(ResNet(18, base_channels=8)).eval()


@pytest.fixture
def float32_only(monkeypatch):
    """Another processor in this one's place: AVX2 and nothing beyond."""
    monkeypatch.setattr(processor, "computes_natively", lambda dtype: dtype not in (torch.bfloat16, torch.float16))


def run_limited(code, isa):
    """Run code as on a processor that has no more than an instruction set."""
    env = dict(os.environ, ONEDNN_MAX_CPU_ISA=isa)
    if isa.startswith("AVX2"):
        env["ATEN_CPU_CAPABILITY"] = "avx2"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert process.returncode == 0, process.stderr
    return process.stdout.split()


@pytest.mark.parametrize("backend", ["auto", "onednn", "eager"])
@pytest.mark.parametrize("with_neck", [False, True])
def test_optimized_computes_in_float32_and_returns_bfloat16(net, images, float32_only, backend, with_neck):
    model = nn.Sequential(net, FPN(net.out_channels, 8, num_outs=5)).eval() if with_neck else net
    with pytest.warns(UserWarning, match=rf"{SLOW}.* computes in float32 and returns feature maps in bfloat16"):
        fast = optimize(model, "bfloat16", backend)
    exact = optimize(model, "float32", backend)
    for given in (images, images.bfloat16()):
        for out, expected in zip(fast(given), exact(given), strict=True):
            assert out.dtype is torch.bfloat16
            assert torch.equal(out, expected.bfloat16())
    assert {tensor.dtype for tensor in fast.state_dict().values() if tensor.is_floating_point()} == {torch.float32}


def test_compiled_computes_in_float32_and_returns_bfloat16(net, images, float32_only, monkeypatch):
    monkeypatch.setattr(nn.Module, "compile", lambda self: None)
    with pytest.warns(UserWarning, match=SLOW):
        fast = optimize(net, "bfloat16", "compile")
    assert {parameter.dtype for parameter in fast.parameters()} == {torch.float32}
    assert {out.dtype for out in fast(images)} == {torch.bfloat16}


def test_the_dtype_asked_for_is_kept_when_moved(net, images, float32_only):
    with pytest.warns(UserWarning, match=SLOW):
        fast = optimize(net, "bfloat16")
    expected = fast(images)
    moved = nn.Sequential(fast).to(torch.bfloat16)  # as a detector that is bfloat16 throughout does
    assert all(map(torch.equal, moved(images), expected))
    with pytest.raises(TypeError, match=r"for torch\.bfloat16 and cannot be converted to torch\.float16"):
        fast.half()


def test_a_net_optimized_on_another_machine_warns_when_loaded(net, images, monkeypatch):
    monkeypatch.setattr(processor, "computes_natively", lambda dtype: True)
    saved = pickle.dumps(optimize(net, "bfloat16", "eager"))
    pickle.loads(saved)
    monkeypatch.setattr(processor, "computes_natively", lambda dtype: dtype is not torch.bfloat16)
    with pytest.warns(UserWarning, match=f"{SLOW}.*optimize the original again"):
        assert pickle.loads(saved)(images)[0].dtype is torch.bfloat16


def test_nothing_is_said_where_nothing_changes(net, images, float32_only):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert optimize(net)(images)[0].dtype is torch.float32
        assert quantize(net.bfloat16(), [images])(images)[0].dtype is torch.float32


@pytest.mark.parametrize("backend", ["auto", "plain"])
def test_extract_computes_in_float32_and_writes_bfloat16(tmp_path, monkeypatch, float32_only, backend):
    monkeypatch.chdir(tmp_path)
    make_picture("a.png")
    settings = ("--backend", backend, "--size", 64, "--format", "safetensors")
    said = run("extract", "resnet18", "a.png", "--out", "half", "--dtype", "bfloat16", *settings).stdout
    assert f"computed in float32 and written in bfloat16: this processor {SLOW}" in said
    run("extract", "resnet18", "a.png", "--out", "whole", *settings)
    half, whole = (load_file(f"{folder}/a.png/features.safetensors") for folder in ("half", "whole"))
    assert all(torch.equal(half[name], whole[name].bfloat16()) for name in whole)


def test_bench_skips_it_and_says_what_it_does(tmp_path, float32_only):
    out = tmp_path / "speed.json"
    lines = run("bench", "resnet18", "--size", "32", "--runs", 1, "--out", out).stdout.splitlines()
    assert lines[0] == "resnet18, 1 image of 32x32 on cpu, 1 run each: plain; optimize, float32; quantize, int8"
    assert any("bfloat16 is skipped" in line for line in lines)
    figures = json.loads(out.read_text())
    assert list(figures["variants"]) == ["plain", "optimize, float32", "quantize, int8"]
    assert list(figures["matmul"]) == ["float32"]


def test_rows_appear_as_they_come(monkeypatch):
    events = []

    def time_variant(net, variant, *_, **__):
        events.append(("timed", variant))
        return benchmark.Timing(1, 1, 1, 1, 1)

    bench = sys.modules["resbackbone.cli.bench"]  # as an attribute it is the command
    monkeypatch.setattr(bench, "echo", lambda text, **_: events.append(text.split("  ")[0]))
    monkeypatch.setattr(benchmark, "time_variant", time_variant)
    run("bench", "resnet18", "--size", "32")
    rows = [event for event in events if event in NAMES or event[0] == "timed"]
    assert rows == [event for name in NAMES if name in rows for event in (("timed", name), name)]


NAMES = ["plain", "optimize, float32", "optimize, bfloat16", "quantize, int8"]


def test_a_compiled_file_warns(net, tmp_path, float32_only, monkeypatch):
    def stop(*_):
        raise OSError("far enough")

    monkeypatch.setattr(
        sys.modules["resbackbone.inference.export"], "_trace", stop
    )  # as an attribute it is the function
    with pytest.warns(UserWarning, match=f"{SLOW}: the compiled file"), pytest.raises(OSError, match="far enough"):
        export(net, tmp_path / "net.pt2", "aoti", dtype="bfloat16")


@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE", "avx512_core_vnni"])
def test_what_onednn_is_limited_to_counts(isa):
    code = (
        "import torch; from resbackbone.utils.processor import computes_natively as f\n"
        "print(f(torch.float32), f(torch.bfloat16), f(torch.float16))"
    )
    assert run_limited(code, isa) == ["True", "False", "False"]


def test_on_a_real_processor_without_it_no_convolution_is_in_bfloat16():
    code = (
        "import torch, warnings; warnings.simplefilter('ignore')\n"
        "from resbackbone import ResNet; from resbackbone.inference import optimize\n"
        "net = ResNet(18, base_channels=8).eval(); x = torch.randn(1, 3, 64, 64)\n"
        "fast, exact = optimize(net, 'bfloat16'), optimize(net)\n"
        "print(all(torch.equal(a, b.bfloat16()) for a, b in zip(fast(x), exact(x))))"
    )
    assert run_limited(code, "AVX2") == ["True"]


def test_where_torch_cannot_say_onednn_is_believed(monkeypatch):
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported", raising=False)  # before torch 2.6
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    assert processor.computes_natively(torch.bfloat16) == torch.ops.mkldnn._is_mkldnn_bf16_supported()


def test_a_processor_whose_avx512_only_converts_counts_as_without(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False, raising=False)
    assert not processor.computes_natively(torch.bfloat16)
