"""Contestants run in turn, and figures get to where they are read."""

import json
import subprocess
import sys

import pytest
import torch
from command_line import fails, run

from resbackbone.analysis.benchmark import (
    describe_machine,
    markdown_table,
    matmul_rate,
    time_alternating,
    write_section,
)
from resbackbone.utils import processor


def test_contestants_run_in_turn():
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


def test_the_peak_of_memory_is_the_process_own():
    parent = torch.ones(1 << 26)  # 256 MiB, which a child that was asked of `getrusage` would begin with
    code = (
        "import torch; from resbackbone.analysis.benchmark import peak_memory; before = peak_memory(); "
        "del (big := [torch.ones(1 << 25)])[:]; print(peak_memory() - before)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0.9 * (1 << 27) < int(run.stdout) < 2 * (1 << 27)
    assert parent[0] == 1


def test_a_table_replaces_a_section_of_a_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Title\n\n<!-- speed -->\nold\n<!-- end of speed -->\n\nThe end.\n")
    table = markdown_table(["path", "ms"], [["ours", "1.0"]])
    assert table == "| path | ms |\n| --- | --- |\n| ours | 1.0 |"
    for _ in range(2):
        write_section(page, "speed", table)
        assert page.read_text() == (f"# Title\n\n<!-- speed -->\n\n{table}\n\n<!-- end of speed -->\n\nThe end.\n")
    with pytest.raises(ValueError, match="has no section <!-- memory -->"):
        write_section(page, "memory", table)


def test_the_command_times_every_way_and_writes_json(tmp_path):
    out = tmp_path / "speed.json"
    run("bench", "resnet18", "--size", "32x48", "--batch", 2, "--runs", 1, "--out", out)
    figures = json.loads(out.read_text())
    assert figures["shape"] == [2, 3, 32, 48]
    half = ["optimize, bfloat16"] if processor.computes_natively(torch.bfloat16) else []
    assert list(figures["ways"]) == ["as it is", "optimize, float32", *half, "quantize, int8"]
    for way in figures["ways"].values():
        assert way["images per second"] == pytest.approx(2 / way["seconds"])
    assert figures["ways"]["as it is"]["times as fast"] == 1


def test_the_command_refuses_in_one_line():
    assert "resnet1" in fails("bench", "resnet1")
    assert "device 'cuda:99' is not there" in fails("bench", "resnet18", "--device", "cuda:99")
