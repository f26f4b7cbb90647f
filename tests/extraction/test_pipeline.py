"""`resbackbone extract` of many pictures: optimized, in batches, in threads, on several ranks, broken off, resumed."""

import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import fails, finished, make_picture, maps, net_and_checkpoint, run, start, write_config, written
from PIL import Image

from resbackbone import ResNet
from resbackbone.data.pictures import read_picture
from resbackbone.data.preprocessing import TORCHVISION
from resbackbone.extraction import PictureResult, extractor
from resbackbone.extraction.extractor import Extractor
from resbackbone.extraction.pipeline import Job, LoadedPicture, in_batches
from resbackbone.inference import optimize

TOLERANCE = 1e-5  # relative to the largest number of a level: what rounding makes of another order of the same sums


def assert_alike(one, other):
    """Two folders of results hold the same feature maps, up to rounding."""
    one, other = maps(one), maps(other)
    assert one.keys() == other.keys() != set()
    for name, values in one.items():
        assert np.abs(values - other[name]).max() <= TOLERANCE * np.abs(other[name]).max(), name


def make_extractor(config="small.yaml", **options):
    return Extractor(config, **options)


@pytest.fixture
def branching(registry):
    """The config of a net that asks what is in its input, which no graph can hold."""

    @registry.register_module()
    class Branching(ResNet):
        def forward(self, x):
            return super().forward(-x if x.mean() > 1e6 else x)

    write_config("branching.yaml", type="Branching")


class TestBackend:
    @pytest.fixture(autouse=True)
    def _picture(self, folder):
        make_picture("a.png")

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_optimized_unless_told_otherwise(self, monkeypatch, dtype):
        asked = []
        monkeypatch.setattr(extractor, "optimize", lambda *args: asked.append(args[1:]) or optimize(*args))
        for options in ((), ("--backend", "eager"), ("--backend", "plain")):
            run("extract", "small.yaml", "a.png", "--out", "out", "--dtype", dtype, *options)
        assert asked == [(dtype, "auto"), (dtype, "eager")]

    @pytest.mark.parametrize("backend", ["auto", "onednn", "eager"])
    @pytest.mark.parametrize("fpn", [(), ("--fpn",)])
    def test_it_is_the_same_up_to_rounding(self, randomize_norms, backend, fpn):
        net_and_checkpoint(randomize_norms, "small.pth")
        arguments = ("extract", "small.yaml", "a.png", "--checkpoint", "small.pth", *fpn)
        run(*arguments, "--backend", backend, "--out", "fast")
        run(*arguments, "--backend", "plain", "--out", "plain")
        assert_alike("fast/a.png", "plain/a.png")

    def test_float16_on_a_cpu_is_refused_before_work_starts(self):
        arguments = ("extract", "small.yaml", "a.png", "--out", "half", "--dtype", "float16")
        for backend in ((), ("--backend", "auto"), ("--backend", "eager"), ("--backend", "onednn")):
            assert fails(*arguments, *backend).startswith("`dtype` float16 is not for CPUs; use float32 or bfloat16")
        assert written("half") == []
        run(*arguments, "--backend", "plain")
        assert maps("half/a.png")["layer4"].dtype == "float16"

    def test_what_is_not_optimized_is_computed_plainly_which_is_said(self):
        dtype = "float64"
        arguments = ("extract", "small.yaml", "a.png", "--dtype", dtype)
        said = run(*arguments, "--out", "out").stdout
        assert "computed by the plain net: `dtype`" in said
        assert dtype in said
        assert make_extractor(dtype=dtype).settings["backend"] == "plain"
        run(*arguments, "--out", "plain", "--backend", "plain")
        for name, values in maps("out/a.png").items():
            assert np.array_equal(values, maps("plain/a.png")[name])
        refused = fails(*arguments, "--out", "named", "--backend", "eager")
        assert refused.startswith("`dtype`")
        assert dtype in refused

    def test_a_net_that_cannot_be_traced_too(self, branching):
        said = run("extract", "branching.yaml", "a.png", "--out", "out").stdout
        assert "computed by the plain net: Branching cannot be traced" in said
        run("extract", "small.yaml", "a.png", "--out", "plain", "--backend", "plain")
        assert np.array_equal(maps("out/a.png")["layer4"], maps("plain/a.png")["layer4"])
        arguments = ("extract", "branching.yaml", "a.png", "--out", "named", "--backend", "onednn")
        assert fails(*arguments).startswith("Branching cannot be traced")
        assert written("named") == []


class TestBatches:
    @staticmethod
    def loaded(*sizes):
        """Pictures of so many pixels a side, each (name, side); None for one that failed."""
        failed, picture = PictureResult(Path("bad"), Path("bad"), "failed"), Image.new("RGB", (1, 1))
        jobs = [Job(Path(str(side)), Path("out")) for side in sizes]
        return [
            failed if side is None else LoadedPicture(job, picture, torch.empty(1, 3, side, side), "")
            for side, job in zip(sizes, jobs, strict=True)
        ]

    @staticmethod
    def sides(batches):
        return [
            None if isinstance(batch, PictureResult) else [one.image.shape[-1] for one in batch] for batch in batches
        ]

    @pytest.mark.parametrize(
        ("sizes", "batches"),
        [
            ([], []),
            ([8, 8, 8, 8], [[8, 8, 8], [8]]),
            ([8, 8, 9, 8], [[8, 8], [9], [8]]),
            ([8, None, 8, 9, None], [None, [8, 8], None, [9]]),
            ([1024] * 3, [[1024, 1024], [1024]]),
            ([1500, 1500], [[1500], [1500]]),
        ],
    )
    def test_neighbors_of_one_size(self, sizes, batches):
        found = self.sides(in_batches(self.loaded(*sizes), 3))
        assert sorted(map(str, found)) == sorted(map(str, batches))

    @pytest.mark.parametrize("backend", ["auto", "plain"])
    def test_features_do_not_depend_on_the_company(self, folder, randomize_norms, backend):
        net_and_checkpoint(randomize_norms, "small.pth")
        for index, name in enumerate(("a", "b", "c", "d", "e")):
            make_picture(f"in/{name}.png")
            make_picture(f"in/{name}_wide.png", size=(90 + index // 3, 50))
        for name, color in (("black", "black"), ("white", "white"), ("zebra", "gray")):
            Image.new("RGB", (70, 50), color).save(f"in/{name}.png")
        arguments = ("extract", "small.yaml", "in", "--checkpoint", "small.pth", "--backend", backend)
        run(*arguments, "--out", "batches", "--batch-size", "4")
        run(*arguments, "--out", "single", "--batch-size", "1")
        assert len(written("batches")) == 13 * 5
        for path in Path("batches").iterdir():
            assert_alike(path, f"single/{path.name}")

    def test_a_batch_is_one_call_of_the_net(self, folder, monkeypatch):
        for name in "abcde":
            make_picture(f"in/{name}.png")
        make_picture("in/c_wide.png", size=(90, 50))
        shapes = []
        call = Extractor.__call__
        monkeypatch.setattr(Extractor, "__call__", lambda self, x: shapes.append(tuple(x.shape)) or call(self, x))
        run("extract", "small.yaml", "in", "--out", "out", "--format", "safetensors", "--backend", "plain")
        assert shapes == [(3, 3, 50, 70), (1, 3, 50, 90), (2, 3, 50, 70)]

    def test_norms_of_the_batch_get_pictures_uses_batch_statistics(self, folder):
        write_config("mixing.yaml", norm_cfg={"type": "BN", "track_running_stats": False})
        for name in "abc":
            make_picture(f"in/{name}.png")
        run("extract", "mixing.yaml", "in", "--out", "batches", "--batch-size", "8")
        run("extract", "mixing.yaml", "in", "--out", "single", "--batch-size", "1")
        for name in "abc":
            assert_alike(f"batches/{name}.png", f"single/{name}.png")
        mixing = make_extractor("mixing.yaml", backend="plain")
        images = torch.cat([TORCHVISION(read_picture(f"in/{name}.png")) for name in "ab"])
        alone, together = mixing(images[:1])[0].maps["layer4"], mixing(images)[0].maps["layer4"]
        assert (alone - together).abs().max() > 0.01 * alone.abs().max()  # they would differ
        assert not make_extractor().uses_batch_statistics

    def test_a_batch_that_does_not_fit_into_memory(self, folder, monkeypatch):
        for name in "abcd":
            make_picture(f"in/{name}.png")
        Image.new("RGB", (70, 50), "white").save("in/c.png")
        call = Extractor.__call__

        def short_of_memory(self, images):
            if len(images) > 1 or images.min() > 2:  # white
                raise torch.OutOfMemoryError("no memory left")
            return call(self, images)

        monkeypatch.setattr(Extractor, "__call__", short_of_memory)
        result = run("extract", "small.yaml", "in", "--out", "out", status=1)
        assert sorted(path.name for path in Path("out").iterdir()) == ["a.png", "b.png", "d.png"]
        assert "a batch of 4 pictures failed: no memory left; computing them one by one\n" in result.stderr
        assert "skipped: in/c.png: no memory left\n" in result.stderr
        assert "3 of 4 pictures extracted" in result.stdout


class TestResume:
    ARGUMENTS = ("extract", "small.yaml", "in", "--out", "out", "--resume")

    @pytest.fixture
    def done(self, folder):
        """Results of two pictures, and when their files were written."""
        for name in "ab":
            make_picture(f"in/{name}.png")
        run(*self.ARGUMENTS)
        return self.times()

    @staticmethod
    def times():
        return {name: Path("out", name).stat().st_mtime_ns for name in written("out")}

    def changed(self, done):
        return {name.split("/")[0] for name, when in self.times().items() if done.get(name) != when}

    def test_what_is_done_is_kept(self, done):
        make_picture("in/c.png")
        result = run(*self.ARGUMENTS)
        assert self.changed(done) == {"c.png"}
        assert "3 of 3 pictures extracted to out, 2 of them by an earlier run" in result.stdout
        assert "look at out/a.png/pyramid.png" in result.stdout

    def test_without_it_everything_is_made_again(self, done):
        run(*self.ARGUMENTS[:-1])
        assert self.changed(done) == {"a.png", "b.png"}

    @pytest.mark.parametrize(
        "option",
        [
            ("--size", "40"),
            ("--dtype", "bfloat16"),
            ("--backend", "plain"),
            ("--fpn",),
            ("--format", "safetensors"),
            ("--checkpoint", "small.pth"),
        ],
    )
    def test_results_of_other_settings_are_not_taken_for_done(self, done, randomize_norms, option):
        net_and_checkpoint(randomize_norms, "small.pth")
        run(*self.ARGUMENTS, *option)
        assert self.changed(done) == {"a.png", "b.png"}
        again = self.times()
        run(*self.ARGUMENTS, *option)
        assert self.times() == again

    def test_nor_those_of_other_weights_in_the_same_file(self, folder, randomize_norms):
        make_picture("in/a.png")
        for _ in range(2):
            net_and_checkpoint(randomize_norms, "small.pth")
            result = run(*self.ARGUMENTS, "--checkpoint", "small.pth")
            assert "earlier run" not in result.stdout
        assert "1 of them by an earlier run" in run(*self.ARGUMENTS, "--checkpoint", "small.pth").stdout

    def test_nor_those_of_another_config(self, done):
        write_config("small.yaml", style="caffe")
        run(*self.ARGUMENTS)
        assert self.changed(done) == {"a.png", "b.png"}

    def test_nor_those_of_a_picture_that_was_replaced(self, done):
        make_picture("in/b.png")
        run(*self.ARGUMENTS)
        assert self.changed(done) == {"b.png"}

    @pytest.mark.parametrize("damage", ["missing level", "missing overview", "empty overview", "foreign overview"])
    def test_nor_what_is_not_all_there(self, done, damage):
        overview = Path("out/b.png/pyramid.png")
        if damage == "missing level":
            Path("out/b.png/layer2.npy").unlink()
        elif damage == "missing overview":
            overview.unlink()
        elif damage == "empty overview":
            overview.write_bytes(b"")
        else:
            make_picture(overview)
        run(*self.ARGUMENTS)
        assert self.changed(done) == {"b.png"}

    def test_an_overview_never_stands_for_a_mixture(self, done, monkeypatch):
        """A run with other settings that breaks off in the middle of a folder leaves nothing that seems complete."""

        def fill_the_disk(self, path, *, level):
            if level == "layer3":
                raise OSError(28, "No space left on device")
            path.write_bytes(b"other")

        with monkeypatch.context() as patch:
            patch.setattr(extractor.Features, "save_npy", fill_the_disk)
            run(*self.ARGUMENTS[:-1], "--size", "40", status=1)
        assert not Path("out/a.png/pyramid.png").exists()
        result = run(*self.ARGUMENTS)
        assert "earlier run" not in result.stdout
        assert maps("out/a.png")["layer1"].shape == (8, 13, 18)

    def test_killed_in_the_middle_it_goes_on(self, folder):
        for index in range(40):
            make_picture(f"in/{index:02}.png", size=(70 + index // 10, 50))
        process = start(*self.ARGUMENTS)
        while process.poll() is None and len(finished("out")) < 3:
            time.sleep(0.002)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        before = self.times()
        kept = finished("out")
        assert 3 <= len(kept) < 40
        struck = Path("out", kept.pop())  # as a kill may leave it
        (struck / "pyramid.png").unlink()
        (struck / ".layer1.01234567.writing.npy").touch()

        assert f"40 of 40 pictures extracted to out, {len(kept)} of them" in run(*self.ARGUMENTS).stdout
        after = self.times()
        assert all(after[f"{name}/layer1.npy"] == before[f"{name}/layer1.npy"] for name in kept)
        run("extract", "small.yaml", "in", "--out", "unbroken")
        assert written("out") == written("unbroken")
        for path in Path("unbroken").iterdir():
            assert_alike(f"out/{path.name}", path)
