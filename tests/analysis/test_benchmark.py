"""Timings in alternation, and `resbackbone bench`."""

import json

import pytest
import torch
from command_line import fails, run

from resbackbone.analysis.benchmark import describe_machine, matmul_rate, time_alternating
from resbackbone.analysis.cost import build_on_meta, measure
from resbackbone.utils import processor


def test_callables_are_timed_in_alternation():
    order = []
    medians = time_alternating({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, runs=3, warmup=1)
    assert order == ["a", "b", *["a", "b"] * 3]
    assert set(medians) == {"a", "b"}
    assert min(medians.values()) > 0


def test_the_machine_is_described():
    facts = describe_machine()
    assert facts["torch"] == torch.__version__
    assert facts["threads"] == str(torch.get_num_threads())
    assert matmul_rate(torch.float32, side=64) > 0


def test_the_command_times_every_variant_and_writes_json(tmp_path):
    out = tmp_path / "speed.json"
    run("bench", "resnet18", "--size", "32x48", "--batch", 2, "--runs", 1, "--out", out)
    figures = json.loads(out.read_text())
    assert figures["shape"] == [2, 3, 32, 48]
    macs = measure(build_on_meta("resnet18"), size=(32, 48)).macs
    half = ["optimize, bfloat16"] if processor.computes_natively(torch.bfloat16) else []
    assert list(figures["variants"]) == ["plain", "optimize, float32", *half, "quantize, int8"]
    for timing in figures["variants"].values():
        assert timing["images_per_second"] == pytest.approx(2 / timing["seconds"])
        assert timing["flops_per_second"] * timing["seconds"] == pytest.approx(4 * macs)
    assert figures["variants"]["plain"]["speedup"] == 1


def test_the_command_refuses_in_one_line():
    assert "resnet1" in fails("bench", "resnet1")
    assert "device 'cuda:99' is not there" in fails("bench", "resnet18", "--device", "cuda:99")
