"""Checkpoints of several files: folders of ``save_pretrained``, and shards with an index."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from resbackbone import ResNet, build_backbone
from resbackbone.checkpoints import convert_state_dict, load_checkpoint
from resbackbone.checkpoints.readers import read_file
from resbackbone.cli import app

NET = {"depth": 18, "base_channels": 4}


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(1)
    return ResNet(**NET).state_dict()


def write_single(folder, weights, suffix):
    name = {"bin": "pytorch_model.bin", "safetensors": "model.safetensors"}[suffix]
    (torch.save if suffix == "bin" else save_file)(dict(weights), folder / name)
    return folder / name


def write_shards(folder, weights, suffix, changes=()):
    """Write three shards and their index, as transformers names them."""
    stem = {"bin": "pytorch_model", "safetensors": "model"}[suffix]
    names = list(weights)
    weight_map = {}
    for number in range(3):
        shard = f"{stem}-{number + 1:05d}-of-00003.{suffix}"
        part = {name: weights[name] for name in names[number::3]}
        (torch.save if suffix == "bin" else save_file)(part, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": {**weight_map, **dict(changes)}}))
    return index


def assert_loaded(net, weights):
    assert all(torch.equal(value, weights[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
@pytest.mark.parametrize("write", [write_single, write_shards])
def test_a_folder_and_what_is_in_it_load(write, suffix, weights, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "resnet"}')
    path = write(tmp_path, weights, suffix)
    for source in (tmp_path, str(tmp_path), f"{tmp_path}/", path, str(path)):
        net = ResNet(**NET)
        report = load_checkpoint(net, source)
        assert report.source == str(source)
        assert_loaded(net, weights)
    assert_loaded(build_backbone({"type": "ResNet", **NET}, checkpoint=str(tmp_path)), weights)


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
@pytest.mark.parametrize("write", [write_single, write_shards])
def test_the_commands_accept_folders(write, suffix, weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    write(tmp_path / "model", convert_state_dict(weights, target="huggingface"), suffix)
    (tmp_path / "small.yaml").write_text("backbone: {type: ResNet, depth: 18, base_channels: 4}")
    result = CliRunner().invoke(app, ["load-report", "small.yaml", "model"])
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(app, ["convert", "model", "native.pth", "--to", "native"])
    assert result.exit_code == 0, result.output
    assert "huggingface to native" in result.output
    assert all(torch.equal(value, weights[key]) for key, value in read_file("native.pth").items())


def test_what_save_pretrained_writes(torchvision, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[2, 2, 2, 2])
    config.layer_type = "basic"
    model = transformers.ResNetModel(config)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert list((tmp_path / "shards").glob("*.index.json"))
    states = [read_file(tmp_path / name) for name in ("whole", "shards")]
    expected = model.state_dict()
    assert states[0].keys() == states[1].keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for state in states for key in expected)


def test_the_file_that_transformers_prefers_comes_first(weights, tmp_path):
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    write_shards(tmp_path, weights, "safetensors")
    torch.save({"y": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    assert list(read_file(tmp_path)) == ["x"]
    (tmp_path / "model.safetensors").unlink()
    assert read_file(tmp_path).keys() == weights.keys()


def test_other_folders_are_refused(weights, tmp_path):
    torch.save(weights, tmp_path / "weights.pth")
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(ValueError, match=r"is a directory without model.safetensors, .*give the path of a file in it"):
        load_checkpoint(ResNet(**NET), tmp_path)


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
@pytest.mark.parametrize(
    ("shard", "message"),
    [
        ("../secret.SUFFIX", r"lists the shard '../secret.\w+'; a shard is a .safetensors or .bin file beside it"),
        ("/etc/secret.SUFFIX", "a shard is a .safetensors or .bin file beside it"),
        ("..\\secret.SUFFIX", "a shard is a .safetensors or .bin file beside it"),
        ("a\n.SUFFIX", "a shard is a .safetensors or .bin file beside it"),
        ("a\0.SUFFIX", "a shard is a .safetensors or .bin file beside it"),
        ("..", "a shard is a .safetensors or .bin file beside it"),
        ("", "a shard is a .safetensors or .bin file beside it"),
        (None, "lists the shard None; a shard is a .safetensors or .bin file beside it"),
        ("model.index.json", "a shard is a .safetensors or .bin file beside it"),
        ("lost.SUFFIX", r"lists the shard 'lost.\w+', which is not beside it; download that too"),
        ("folder.SUFFIX", r"lists the shard 'folder.\w+', which is not beside it; download that too"),
        ("linked.SUFFIX", r"lists the shard 'linked.\w+', which is a link to another folder; copy the file there"),
        ("same.SUFFIX", r"lists the shard 'same.\w+', which holds a tensor of another shard again"),
        ("text.SUFFIX", r"lists the shard 'text.\w+', which is text and no checkpoint"),
        ("index.SUFFIX", r"lists the shard 'index.\w+', which is JSON and no checkpoint"),
        ("more.SUFFIX", r"lists the shard 'more.\w+', which holds more than tensors by name"),
        ("empty.SUFFIX", r"lists the shard 'empty.\w+', which is empty; download or copy it again"),
    ],
)
def test_shards_are_files_beside_their_index(shard, message, suffix, weights, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    shard = shard and shard.replace("SUFFIX", suffix)
    for path in (tmp_path / "secret", tmp_path / "other", folder / "same"):
        write_single(tmp_path, {"conv1.weight": weights["conv1.weight"]}, suffix).replace(f"{path}.{suffix}")
    (folder / f"linked.{suffix}").symlink_to(tmp_path / f"other.{suffix}")
    (folder / f"folder.{suffix}").mkdir()
    (folder / f"text.{suffix}").write_text("hello")
    (folder / f"empty.{suffix}").write_bytes(b"")
    (folder / f"index.{suffix}").write_text(json.dumps({"weight_map": {"x": f"index.{suffix}"}}))
    torch.save({"x": torch.ones(1), "y": {"z": torch.ones(1)}}, folder / f"more.{suffix}")
    write_shards(folder, weights, suffix, changes={"z.weight": shard})
    net = ResNet(**NET)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(ValueError, match=message) as caught:
        load_checkpoint(net, folder)
    assert "\n" not in str(caught.value)
    assert_loaded(net, before)


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_the_cache_of_huggingface_hub_is_read(suffix, weights, tmp_path):
    """A snapshot in the cache has links to blobs, two folders above."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0a1b"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    write_shards(blobs, weights, suffix)
    for number, path in enumerate(sorted(blobs.iterdir())):
        blob = path.rename(blobs / f"{number:064x}")
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    net = ResNet(**NET)
    load_checkpoint(net, snapshot)
    assert_loaded(net, weights)


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_a_tensor_that_no_shard_has_is_named(suffix, weights, tmp_path):
    shard = json.loads(write_shards(tmp_path, weights, suffix).read_text())["weight_map"]["conv1.weight"]
    index = write_shards(tmp_path, weights, suffix, changes={"lost.weight": shard})
    with pytest.raises(ValueError, match=r"lists 'lost.weight', which its shard does not hold"):
        read_file(index)
