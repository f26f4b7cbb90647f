"""What the benchmark tools share."""

import subprocess
import sys
from pathlib import Path

import bench_report
import pytest
import torch
from bench_report import markdown_table, write_section


def test_the_peak_of_memory_is_the_process_own():
    parent = torch.ones(1 << 26)  # 256 MiB, which a child that was asked of `getrusage` would begin with
    code = (
        f"import sys; sys.path.insert(0, {str(Path(bench_report.__file__).parent)!r}); "
        "import torch; from bench_report import peak_memory; before = peak_memory(); "
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
