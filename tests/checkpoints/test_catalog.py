"""The catalog of published weights: its entries, their sources, and lookup by name."""

import re
from pathlib import Path

import build_catalog
import pytest
import torch
import yaml
from catalog_origins import ORIGINS, mmengine_names
from faulty_server import serve
from rich.console import Console
from safetensors.torch import save
from typer.testing import CliRunner

from resbackbone import build_backbone, list_backbones
from resbackbone.analysis.cost import build_on_meta, measure
from resbackbone.checkpoints import convert_state_dict, load_checkpoint
from resbackbone.checkpoints.hub import Weights, default_weights, find_weights, list_weights, sources
from resbackbone.checkpoints.hub.catalog import all_names
from resbackbone.checkpoints.hub.download import DownloadError, cache_path
from resbackbone.checkpoints.hub.sources import PREFIXES, locate
from resbackbone.checkpoints.layouts import LAYOUTS
from resbackbone.cli import app
from resbackbone.config import load_config, recorded_costs

ALL = list_weights()
NAMES = {weights.name: weights for weights in ALL}
# The names of ResNets in mmengine's tables, which have other models, too.
FAMILY = re.compile(r"(.*/)?(wide_|se-)?(resnet|resnext|resnest|regnet|res2net)[^/]*")


# The entries


def test_there_are_many():
    assert len(ALL) > 350
    assert {name.partition("/")[0] for name in NAMES} == set(ORIGINS)


def test_no_entry_hides_another():
    """A key that occurs twice in YAML overwrites the first one."""
    text = build_catalog.CATALOG.read_text(encoding="utf-8")
    assert len(re.findall(r"^  \S.*:$", text, re.MULTILINE)) == len(ALL)
    assert len({weights.url for weights in ALL}) == len(ALL)
    assert len({cache_path(weights.url) for weights in ALL}) == len(ALL)
    assert len(all_names()) == sum(2 + len(weights.aliases) for weights in ALL)


@pytest.mark.parametrize("weights", ALL, ids=lambda weights: weights.name)
def test_entry(weights):
    assert weights.layout in LAYOUTS
    config = load_config(weights.config)  # it exists
    if weights.overrides:
        complexity = measure(build_on_meta({**config.backbone, **weights.overrides}))
        costs = complexity.params_with_classifier, complexity.macs_with_classifier
    else:
        costs = recorded_costs()[weights.config]["params"], recorded_costs()[weights.config]["macs"]
    assert (weights.params, weights.macs) == costs
    assert weights.url.startswith("https://")
    assert (weights.sha256 or "") in cache_path(weights.url).name
    assert weights.sha256 is None or re.fullmatch(r"[0-9a-f]{8,}", weights.sha256)
    assert weights.acc1 is None or 50 < weights.acc1 < (weights.acc5 or 100) <= 100
    assert weights.crop_pct is None or 0.5 < weights.crop_pct <= 1
    assert all(re.match(r"[a-z0-9-]+://.", alias) for alias in weights.aliases)
    if expected := weights.preprocessing:
        # Photographs have more red than green than blue.
        assert list(expected.mean) == sorted(expected.mean, reverse=expected.order == "RGB")
        assert len(expected.std) == 3
        assert all(1 <= value <= 255 for value in expected.std)


def test_each_architecture_has_one_default():
    defaults = [weights.config for weights in ALL if weights.default]
    assert sorted(defaults) == sorted({weights.config for weights in ALL if not weights.overrides})
    assert not [weights.name for weights in ALL if weights.default and weights.overrides]


def test_figures_that_everybody_knows():
    """Figures from the READMEs of torchvision and mmpretrain, and detectron2's defaults."""
    v2 = find_weights("torchvision/resnet50.imagenet1k_v2")
    assert (v2.acc1, v2.acc5, v2.sha256, v2.params, v2.size_mib) == (80.858, 95.434, "11ad3fa6", 25557032, 97.79)
    assert find_weights("torchvision/resnet50.imagenet1k_v1").acc1 == 76.13
    cifar = find_weights("mmpretrain/resnet18_8xb16_cifar10")
    assert (cifar.acc1, cifar.classes, cifar.preprocessing.order) == (94.82, 10, "RGB")
    msra = find_weights("detectron2://ImageNetPretrained/MSRA/R-50.pkl")
    assert (msra.config, msra.layout, msra.preprocessing.order) == ("resnet50_caffe", "detectron2", "BGR")
    assert msra.preprocessing.mean == (103.53, 116.28, 123.675)
    assert find_weights("open-mmlab://jhu/resnet50_gn_ws").overrides["conv_cfg"] == {"type": "ConvWS"}


# Lookup


def test_listing():
    assert [weights.name for weights in list_weights("torchvision/resnet50.*")] == [
        "torchvision/resnet50.imagenet1k_v1",
        "torchvision/resnet50.imagenet1k_v2",
    ]
    assert list_weights("nothing") == []
    assert list(NAMES) == sorted(NAMES)
    with pytest.raises(AttributeError):
        ALL[0].url = "https://elsewhere"
    assert {ALL[0]: 1}[ALL[0]] == 1  # hashable, overrides or not
    assert len(set(ALL)) == len(ALL)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("torchvision/resnet50.imagenet1k_v2", "torchvision/resnet50.imagenet1k_v2"),
        ("torchvision://resnet50", "torchvision/resnet50.imagenet1k_v1"),
        ("modelzoo://resnet50", "torchvision/resnet50.imagenet1k_v1"),
        ("torchvision://resnet50.default", "torchvision/resnet50.imagenet1k_v2"),
        ("torchvision://resnet50.imagenet1k_v2", "torchvision/resnet50.imagenet1k_v2"),
        ("open-mmlab://resnet50_v1c", "open-mmlab/resnet50_v1c"),
        ("openmmlab://resnet50_v1c", "open-mmlab/resnet50_v1c"),
        ("open-mmlab://resnet101_caffe", "open-mmlab/detectron/resnet101_caffe"),
        ("open-mmlab://resnet101_caffe_bgr", "open-mmlab/detectron2/resnet101_caffe"),
        ("mmcls://resnet50", "mmpretrain/resnet50_8xb32_in1k"),
        ("mmcls://resnest200", "mmpretrain/resnest200"),
        ("timm://resnet50.a1_in1k", "timm/resnet50.a1_in1k"),
        ("timm://resnet50.tv2_in1k", "torchvision/resnet50.imagenet1k_v2"),
        ("detectron2://ImageNetPretrained/FAIR/X-101-32x8d.pkl", "detectron2/FAIR/X-101-32x8d"),
    ],
)
def test_names(name, found):
    assert find_weights(name).name == found


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(KeyError, match=r"known as 'torchvision://resnett50'; did you mean 'torchvision://resnet\d+'"):
        find_weights("torchvision://resnett50")
    with pytest.raises(KeyError, match=r"published weights are known for 'resnett50'; did you mean 'resnet\d+'"):
        default_weights("resnett50")
    assert default_weights("resnet50").name == "torchvision/resnet50.imagenet1k_v2"


def openmmlab_tables():
    """Return prefix, name and address of each entry of mmengine's tables."""
    tables = {"torchvision": "torchvision_0.12.json", "open-mmlab": "openmmlab.json", "mmcls": "mmcls.json"}
    return [(p, name, url) for p, file in tables.items() for name, url in mmengine_names(file).items()]


@pytest.mark.parametrize("prefix", ["torchvision", "open-mmlab", "mmcls"])
def test_names_mean_what_they_mean_to_mmengine(prefix):
    table = {name: url for found, name, url in openmmlab_tables() if found == prefix}
    known = {name for name in table if FAMILY.fullmatch(name)}
    assert len(known) > 20
    for name in known:
        assert find_weights(f"{prefix}://{name}").url == table[name]
    for name in set(table) - known:
        with pytest.raises(KeyError):
            find_weights(f"{prefix}://{name}")


def test_long_names_mean_what_they_mean_to_mmengine(torchvision):
    """Names that mmengine builds from torchvision's lists."""
    from mmengine.runner.checkpoint import get_torchvision_models

    urls = {weights.url for weights in ALL}
    table = {name: url for name, url in get_torchvision_models().items() if url in urls}
    assert len(table) > 80
    for name, url in table.items():
        assert find_weights(f"torchvision://{name}").url == url


def test_old_names_mean_what_they_mean_to_mmengine():
    table = mmengine_names("openmmlab.json")
    for old, new in mmengine_names("deprecated.json").items():
        # Two of the new names are in none of mmengine's tables.
        assert find_weights(f"open-mmlab://{old}").url == table[new.removesuffix("_bgr")]


# From a source to a file


@pytest.fixture
def brought(monkeypatch):
    """Record address and hash of each download instead of downloading."""
    asked = []
    monkeypatch.setattr(sources, "fetch", lambda url, **kwargs: asked.append((url, kwargs)) or Path("there"))
    return asked


@pytest.mark.parametrize(
    "source",
    ["catalog:torchvision/resnet18.imagenet1k_v1", "torchvision/resnet18.imagenet1k_v1", "modelzoo://resnet18"],
)
def test_names_are_downloaded_with_their_hash(brought, source):
    path, weights = locate(source)
    assert path == Path("there")
    assert isinstance(weights, Weights)
    [(url, options)] = brought
    assert url == "https://download.pytorch.org/models/resnet18-f37072fd.pth"
    assert options["sha256_prefix"] == "f37072fd"
    assert 46_830_571 < options["max_bytes"] < 60_000_000  # the file's length, and not much more


def test_addresses_of_the_catalog_are_recognised(brought):
    assert locate("https://download.pytorch.org/models/resnet18-f37072fd.pth")[1] == find_weights(
        "torchvision://resnet18"
    )
    assert locate("http://download.pytorch.org/models/other-f37072fd.pth") == (Path("there"), None)
    assert brought[1] == ("http://download.pytorch.org/models/other-f37072fd.pth", {})


@pytest.mark.parametrize("kind", [str, Path])
def test_files_go_before_names(brought, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    file = Path("torchvision/resnet18.imagenet1k_v1")
    file.parent.mkdir()
    file.touch()
    assert locate(kind(file)) == (file, None)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate(kind(f"~/{file}")) == (tmp_path / file, None)
    assert brought == []


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("work_dirs/epoch_12.pth", FileNotFoundError, "no checkpoint at 'work_dirs/epoch_12.pth'$"),
        (Path("torchvision/resnet18.imagenet1k_v1"), FileNotFoundError, "no checkpoint at 'torchvision/resnet18"),
        ("torchvision/resnet18", FileNotFoundError, "did you mean 'torchvision/resnet18.imagenet1k_v1'"),
        ("catalog:torchvision/resnet18", KeyError, "did you mean 'torchvision[:/]+resnet18"),
        ("mmcls://resnett50", KeyError, r"known as 'mmcls://resnett50'; did you mean 'mmcls://resnet\d+'"),
        ("s3://bucket/a.pth", ValueError, "got 's3://bucket/a.pth'; download the file and give its path"),
        ("https://download.pytorch.org/models/", ValueError, "must end in the name of a file"),
        (18, TypeError, "`source` must be a path, a URL or the name of published weights, got 18"),
    ],
)
def test_sources_that_do_not_exist(source, error, message):
    with pytest.raises(error, match=message):
        locate(source)


def test_the_error_of_a_prefix_names_all():
    with pytest.raises(ValueError, match="checkpoint's prefix") as caught:
        locate("petrel://bucket/a.pth")
    assert all(f"{prefix}://" in str(caught.value) for prefix in (*PREFIXES, "http", "https"))


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A local server in place of the Hub and torchvision's, and an empty cache."""
    monkeypatch.setattr(Console, "is_terminal", False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("no_proxy", "*")
    with serve() as web:
        pairs = [f"https://{host}={web.url}/{host}" for host in ("huggingface.co", "download.pytorch.org")]
        monkeypatch.setenv("RESBACKBONE_MIRROR", ",".join(pairs))
        yield web


def test_a_catalog_name_loads(mirror, tmp_path):
    trained, net = build_backbone("resnet18_v1d"), build_backbone("resnet18_v1d")
    mirror.content = save(convert_state_dict(trained.state_dict(), target="timm"))
    report = load_checkpoint(net, "timm://resnet18d.ra4_e3600_r224_in1k")
    hub = "/huggingface.co/timm/resnet18d.ra4_e3600_r224_in1k/resolve/main/model.safetensors"
    assert [asked for asked, _ in mirror.requests] == [hub]
    assert list((tmp_path / "hub" / "checkpoints").glob("????????_model.safetensors"))
    assert report.layout == "timm"
    assert net.preprocessing.mean == (127.5, 127.5, 127.5)
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in trained.state_dict().items())


def test_a_false_file_of_the_catalog_is_refused(mirror):
    net = build_backbone("resnet18")
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(DownloadError, match=r"not f37072fd\.\.\.; put the file at"):
        load_checkpoint(net, "torchvision://resnet18")
    assert [asked for asked, _ in mirror.requests] == ["/download.pytorch.org/models/resnet18-f37072fd.pth"]
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in before.items())


# tools/build_catalog.py


def test_the_catalog_equals_the_metadata_of_the_packages(capsys):
    """Return the origins that are installed in the releases that the catalog names."""
    build_catalog.main(check=True)
    assert capsys.readouterr().out.startswith("checked: ")


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """Run the tool on a copy, without packages: only detectron2's part needs none."""
    path = tmp_path / "catalog.yaml"
    path.write_bytes(build_catalog.CATALOG.read_bytes())
    origins = {name: origin._replace(packages=("no-such",)) for name, origin in ORIGINS.items()}
    monkeypatch.setattr(build_catalog, "ORIGINS", origins | {"detectron2": ORIGINS["detectron2"]})
    monkeypatch.setattr(build_catalog, "CATALOG", path)
    return path


def test_entries_of_absent_origins_stay(copy):
    before = copy.read_text()
    build_catalog.main(check=False)
    assert yaml.safe_load(copy.read_text()) == yaml.safe_load(before)


def test_a_changed_figure_is_noticed(copy):
    build_catalog.main(check=True)
    copy.write_text(copy.read_text().replace("MSRA/R-50.pkl\n", "MSRA/R-51.pkl\n"))
    with pytest.raises(SystemExit, match=r"catalog.yaml is out of date; run `python tools/build_catalog.py`"):
        build_catalog.main(check=True)


def test_a_backbone_that_does_not_fit_is_refused():
    (right, *_) = ORIGINS["detectron2"].read()
    values = {"layout": "native", "classes": 1000}
    right = type(right)(**vars(right) | {"values": values, "build": lambda: build_on_meta("resnet50")})
    for fits, config in ((True, "resnet50"), (True, "resnet50_v1b"), (False, "resnet50_v1d"), (False, "resnet18")):
        published = type(right)(**vars(right) | {"config": config})
        if fits:
            assert list(build_catalog.differences(published)) == []
        else:
            with pytest.raises(ValueError, match=f"does not fit the config '{config}': "):
                list(build_catalog.differences(published))


def test_figures_that_are_not_the_models_are_reported():
    (right, *_) = ORIGINS["detectron2"].read()
    said = {"config": "resnet50", "values": {"classes": 1000}, "params": 2180000, "gmacs": 4.09}
    reports = list(build_catalog.differences(type(right)(**vars(right) | said)))
    assert [re.search(r"states ([\d.,]+)", report)[1] for report in reports] == ["2,180,000", "4.09"]
    said |= {"params": 25_560_000, "gmacs": 4.089}  # rounded
    assert list(build_catalog.differences(type(right)(**vars(right) | said))) == []


# The command


def run(*arguments):
    return CliRunner().invoke(app, ["list", "--weights", *arguments])


def test_the_command_lists_weights():
    result = run("torchvision/resnet50.*")
    assert result.exit_code == 0
    lines = re.sub(r"\x1b\[[0-9;]*m", "", result.stdout).splitlines()
    rows = [line.split() for line in lines if "torchvision/" in line]
    common = ["25.6", "M"]
    assert rows == [
        ["torchvision/resnet50.imagenet1k_v1", "resnet50", *common, "76.13", "92.86", "97.78", "bsd-3-clause"],
        ["torchvision/resnet50.imagenet1k_v2", "resnet50", "*", *common, "80.86", "95.43", "97.79", "bsd-3-clause"],
    ]


def test_the_command_cuts_nothing_off(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    long = max(NAMES, key=len)
    assert long in run(long).stdout


def test_the_command_lists_names_alone():
    result = run("--names")
    assert result.stdout.splitlines() == list(NAMES)


def test_the_command_suggests_the_nearest_name():
    result = run("torchvision/resnett50.imagenet1k_v1")
    assert result.exit_code == 2
    assert "no weights match 'torchvision/resnett50.imagenet1k_v1'; did you mean" in result.stderr


def test_architectures_that_have_weights_are_ours():
    assert {weights.config for weights in ALL} <= set(list_backbones())
