"""Loading a file of weights: all of it or nothing."""

import pytest
import torch
from safetensors.torch import save_file

from resbackbone import ResNet, build_backbone
from resbackbone.checkpoints import load_checkpoint


def small(**kwargs):
    return ResNet(18, base_channels=8, **kwargs)


@pytest.fixture
def source():
    torch.manual_seed(1)
    net = small()
    for buffer in net.buffers():
        buffer.add_(1)
    return net


def assert_same(net, other):
    pairs = zip(net.state_dict().items(), other.state_dict().items(), strict=True)
    assert all(key == other_key and torch.equal(a, b) for (key, a), (other_key, b) in pairs)


@pytest.mark.parametrize("wrap", [dict, lambda s: {"state_dict": s, "meta": {"epoch": 1}}, lambda s: {"model": s}])
def test_a_state_dict_and_its_usual_wrappings_load(source, tmp_path, wrap):
    torch.save(wrap(source.state_dict()), tmp_path / "net.pth")
    net = small()
    report = load_checkpoint(net, tmp_path / "net.pth")
    assert_same(net, source)
    assert len(report.loaded) == len(net.state_dict())
    assert not report.missing + report.unexpected + report.mismatched


def test_safetensors_load(source, tmp_path):
    save_file(source.state_dict(), tmp_path / "net.safetensors")
    net = small()
    load_checkpoint(net, tmp_path / "net.safetensors")
    assert_same(net, source)


def test_the_backbone_of_a_whole_detector_loads_and_its_heads_are_counted(source, tmp_path):
    detector = {f"backbone.{key}": value for key, value in source.state_dict().items()}
    detector["neck.lateral_convs.0.conv.weight"] = torch.zeros(1)
    torch.save({"state_dict": detector}, tmp_path / "detector.pth")
    net = small()
    report = load_checkpoint(net, tmp_path / "detector.pth")
    assert_same(net, source)
    assert report.unexpected == ("neck.lateral_convs.0.conv.weight",)


def test_a_classifier_is_left_over(source, tmp_path):
    torch.save({**source.state_dict(), "fc.weight": torch.zeros(10, 64)}, tmp_path / "net.pth")
    assert load_checkpoint(small(), tmp_path / "net.pth").unexpected == ("fc.weight",)


def test_files_from_before_the_batch_counter_load(source, tmp_path):
    old = {key: value for key, value in source.state_dict().items() if "num_batches_tracked" not in key}
    torch.save(old, tmp_path / "net.pth")
    assert load_checkpoint(small(), tmp_path / "net.pth").missing == ()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: s.pop("layer3.0.conv1.weight"), "layer3.0.conv1.weight"),
        (
            lambda s: s.update({"conv1.weight": torch.zeros(8, 4, 7, 7)}),
            r"conv1.weight \(8, 4, 7, 7\) for \(8, 3, 7, 7\)",
        ),
        (lambda s: s.clear(), "0 tensors loaded"),
    ],
    ids=["missing", "another shape", "empty"],
)
def test_what_does_not_fit_changes_nothing(source, tmp_path, spoil, message):
    content = source.state_dict()
    spoil(content)
    torch.save(content, tmp_path / "net.pth")
    net = small()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_checkpoint(net, tmp_path / "net.pth")
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


class Evil:
    def __reduce__(self):
        return print, ("ran",)


def test_a_file_that_wants_to_run_code_is_refused(tmp_path, capsys):
    torch.save({"state_dict": {}, "meta": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"evil\.pth' cannot be read as weights alone"):
        load_checkpoint(small(), tmp_path / "evil.pth")
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["net.pth", "net.safetensors"])
def test_a_damaged_file_is_refused(source, tmp_path, name):
    path = tmp_path / name
    (save_file if path.suffix == ".safetensors" else torch.save)(source.state_dict(), path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be read as weights alone"):
        load_checkpoint(small(), path)


def test_something_else_than_a_state_dict_is_refused(tmp_path):
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds no state dict but a list"):
        load_checkpoint(small(), tmp_path / "list.pth")


def test_a_missing_file_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nowhere\.pth"):
        build_backbone("resnet18", checkpoint=tmp_path / "nowhere.pth")


def test_build_backbone_loads(source, tmp_path):
    torch.save(source.state_dict(), tmp_path / "net.pth")
    net = build_backbone({"type": "ResNet", "depth": 18, "base_channels": 8}, checkpoint=tmp_path / "net.pth")
    assert_same(net, source)
