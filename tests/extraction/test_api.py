"""``extract`` from Python: it does what the command does, returns a summary, and leaves the process as it was."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import SMALL, make_picture, maps, run, written

from resbackbone import build_backbone
from resbackbone.extraction import DistributedContext, extract


@pytest.fixture
def pictures(folder):
    """Two pictures, a damaged one and one that Pillow cannot read."""
    for name in "ab":
        make_picture(f"in/{name}.png")
    Path("in/cut.png").write_bytes(Path("in/a.png").read_bytes()[:999])
    Path("in/film.exr").touch()
    return Path("in")


def test_it_writes_what_the_command_writes(pictures):
    options = ("--size", "40x64", "--fpn", "--dtype", "float64", "--backend", "plain", "--batch-size", "2")
    run("extract", "small.yaml", "in", "--out", "command", *options, status=1)
    extract(
        Path("small.yaml"),
        "in",
        out="python",
        size=(40, 64),
        fpn=True,
        dtype="float64",
        backend="plain",
        batch_size=2,
        warn=str,
    )
    assert written("python") == written("command")
    for name in written("python"):
        if name.endswith(".npy"):
            assert np.array_equal(np.load(Path("python", name)), np.load(Path("command", name)))
    extract(SMALL, ["in/a.png"], out="safe", file_format="safetensors")
    assert written("safe") == ["a.png/features.safetensors", "a.png/pyramid.png"]


def test_the_summary_has_counts_errors_and_what_was_left_out(pictures, capfd):
    lines, warnings = [], []
    summary = extract("small.yaml", pictures, out="out", report=lines.append, warn=warnings.append)
    assert (summary.num_extracted, summary.num_kept, summary.num_failed) == (2, 0, 1)
    assert list(summary.errors) == [Path("in/cut.png")]
    assert summary.errors[Path("in/cut.png")].startswith("cannot read picture 'in/cut.png': ")
    assert list(summary.skipped) == [Path("in/film.exr")]
    assert summary.non_finite == {}
    assert summary.overview == Path("out/a.png/pyramid.png")
    assert lines == ["weights: random (no checkpoint given)"]
    assert warnings == ["1 skipped, as Pillow cannot read .exr here: 'in/film.exr'"]
    assert capfd.readouterr() == ("", "")


def test_left_out_files_are_warned_of_unless_somebody_listens(pictures):
    with pytest.warns(UserWarning, match="1 skipped, as Pillow cannot read .exr here") as caught:
        extract("small.yaml", pictures, out="out")
    assert caught[0].filename == __file__


def test_complete_results_are_kept(pictures):
    extract("small.yaml", "in/a.png", out="out")
    summary = extract("small.yaml", ["in/a.png", "in/b.png"], out="out", resume=True)
    assert (summary.num_extracted, summary.num_kept, summary.num_failed) == (1, 1, 0)
    assert summary.overview == Path("out/a.png/pyramid.png")
    assert extract("small.yaml", "in/a.png", out="out", resume=True, size=32).num_kept == 0


def test_progress_gets_every_result_and_the_total(pictures):
    seen = []

    def progress(results, total):
        for result in results:
            seen.append((total, result.path.name, result.status))
            yield result

    extract("small.yaml", pictures, out="out", progress=progress, warn=str)
    assert sorted(seen) == [(3, "a.png", "extracted"), (3, "b.png", "extracted"), (3, "cut.png", "failed")]


def test_non_finite_levels_are_named(folder, randomize_norms):
    make_picture("a.png")
    net = randomize_norms(build_backbone(SMALL))
    net.layer4[1].bn2.weight.data.fill_(1e30)
    torch.save(net.state_dict(), "huge.pth")
    summary = extract(SMALL, "a.png", out="out", checkpoint="huge.pth", dtype="float16", backend="plain")
    assert summary.non_finite == {Path("a.png"): ("layer4",)}
    assert summary.num_extracted == 1


def test_the_callers_random_numbers_are_not_touched(pictures):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    extract("small.yaml", "in/a.png", out="out", fpn=True)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dtype": "int8"}, ValueError, "`dtype` must be one of 'float32'"),
        ({"backend": "fast"}, ValueError, "`backend` must be one of 'auto'"),
        ({"file_format": "hdf5"}, ValueError, "`file_format` must be one of 'npy', 'safetensors'"),
        ({"batch_size": 0}, ValueError, "`batch_size` must be at least 1"),
        ({"size": "640"}, TypeError, "`size` must be an integer"),
        ({"size": (640,)}, ValueError, "`size`"),
        ({"device": "warp9"}, ValueError, "device 'warp9' is not there"),
        ({"checkpoint": "gone.pth"}, FileNotFoundError, "no checkpoint at 'gone.pth'"),
        ({"config": "resnt18"}, KeyError, "did you mean 'resnet18'"),
        ({"pictures": "gone.png"}, FileNotFoundError, "no picture or folder at 'gone.png'"),
        ({"out": "small.yaml"}, FileExistsError, "small.yaml"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused_before_anything_is_written(pictures, options, error, message):
    before = written(".")
    arguments = {"config": "small.yaml", "pictures": "in/a.png", "out": "out", **options}
    with pytest.raises(error, match=message):
        extract(arguments.pop("config"), arguments.pop("pictures"), **arguments)
    assert written(".") == before


def test_a_rank_extracts_its_shard(folder):
    for name in "abc":
        make_picture(f"in/{name}.png")
    summary = extract("small.yaml", "in", out="out", distributed=DistributedContext(rank=1, world_size=2))
    assert summary.num_extracted == 1
    assert list(maps("out/b.png")) == ["layer1", "layer2", "layer3", "layer4"]


RANKS = """
import sys, torch
from resbackbone.extraction import extract
if sys.argv[1] == "initialized":
    torch.distributed.init_process_group("gloo")
for out in ("one", "two"):
    summary = extract("small.yaml", "in", out=out)
    assert summary.num_extracted == 5, summary
print(len(summary.errors), torch.distributed.is_initialized())
"""


@pytest.mark.slow  # processes that import torch
@pytest.mark.parametrize("group", ["initialized", "not initialized"])
def test_ranks_add_up_their_counts_in_the_callers_process_group_or_their_own(folder, group):
    for name in "abcde":
        make_picture(f"in/{name}.png")
    Path("in/bad.png").touch()
    Path("ranks.py").write_text(RANKS)
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    command = [sys.executable, "-m", *launcher, "ranks.py", group]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert shown.returncode == 0, shown.stderr
    is_initialized = group == "initialized"
    assert sorted(shown.stdout.splitlines()) == [f"0 {is_initialized}", f"1 {is_initialized}"]
    assert written("one") == written("two")
