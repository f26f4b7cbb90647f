"""Extraction by several ranks, with and without a connection between them."""

from pathlib import Path

import pytest
import torch
from command_line import fails, finished, make_picture, run, start, written

from resbackbone.extraction.distributed import DistributedContext, local_device


class TestRanks:
    def test_each_rank_takes_its_share(self, folder, monkeypatch):
        for index in range(7):
            make_picture(f"in/{index}.png")
        shares = []
        for rank in range(3):
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("WORLD_SIZE", "3")
            result = run("extract", "small.yaml", "in", "--out", f"out{rank}")
            shares.append(finished(f"out{rank}"))
            assert f"rank {rank} of 3: {len(shares[-1])} of {len(shares[-1])} pictures extracted" in result.stdout
            assert ("weights: random" in result.stdout) == (rank == 0)
        assert sorted(name for share in shares for name in share) == [f"{index}.png" for index in range(7)]
        assert sorted(map(len, shares)) == [2, 2, 3]

    def test_a_share_may_be_empty(self, folder, monkeypatch):
        make_picture("in/a.png")
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert "rank 1 of 2: 0 of 0 pictures" in run("extract", "small.yaml", "in", "--out", "out").stdout

    @pytest.mark.parametrize(
        ("rank", "world_size", "message"),
        [
            ("1", None, "the environment needs both RANK and WORLD_SIZE"),
            (None, "2", "the environment needs both RANK and WORLD_SIZE"),
            ("one", "2", "as numbers, or neither; got {'RANK': 'one', 'WORLD_SIZE': '2'}"),
            ("-1", "2", "as numbers, or neither"),
            ("2", "2", "RANK must be below WORLD_SIZE (=2), got 2"),
        ],
    )
    def test_numbers_that_make_no_sense(self, folder, monkeypatch, rank, world_size, message):
        make_picture("in/a.png")
        for name, value in (("RANK", rank), ("WORLD_SIZE", world_size)):
            if value is not None:
                monkeypatch.setenv(name, value)
        assert message in fails("extract", "small.yaml", "in", "--out", "out")
        assert written("out") == []

    def test_every_rank_has_its_gpu(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        assert local_device("cuda") == "cuda"
        monkeypatch.setenv("LOCAL_RANK", "1")
        assert [local_device(device) for device in ("cuda", "cuda:0", "cpu")] == ["cuda:1", "cuda:0", "cpu"]
        monkeypatch.setenv("LOCAL_RANK", "3")  # where each sees its own only
        assert local_device("cuda") == "cuda:1"
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        assert local_device("cuda") == "cuda"

    def test_alone_without_variables(self):
        context = DistributedContext.from_environment()
        assert (context.rank, context.world_size, context.is_connected) == (0, 1, False)
        assert context.sum(3, 4) == [3, 4]

    @pytest.mark.slow  # three processes that import torch
    def test_under_torchrun_a_rank_with_bad_pictures_does_not_end_the_others(self, folder):
        """It kills all as soon as one has failed; here the second has failed long before the first is done."""
        good, bad = ({f"{index:02}.png" for index in range(first, 48, 2)} for first in (0, 1))
        for name in good:
            make_picture(f"in/{name}", size=(700, 500))
        for name in bad:
            Path("in", name).touch()
        launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")
        process = start("extract", "small.yaml", "in", "--out", "out", launcher=launcher)
        stdout, stderr = process.communicate(timeout=300)
        assert finished("out") == good
        assert process.returncode == 1
        assert stdout.count("weights: random") == 1
        assert stdout.count("24 of 48 pictures extracted to out") == 1
        assert stdout.count("extracted") == 1
        assert all(f"skipped: cannot read picture 'in/{name}'" in stderr for name in bad)
        assert "24 skipped" in stderr
