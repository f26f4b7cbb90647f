"""Image folder dataset: classes, links, unreadable pictures and augmentation seeds."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from resbackbone.training.classification import (
    ImageFolder,
    UnreadablePictureError,
)
from resbackbone.training.engine import SeededIndex


@pytest.fixture
def folder(tmp_path):
    """Two classes with three pictures each, one of them in a nested folder."""
    for name in ("cat/0.png", "cat/1.png", "cat/more/2.png", "dog/0.png", "dog/1.png", "dog/2.png"):
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 10), (200, int(path.stem) * 10, 0)).save(path)
    return tmp_path / "pictures"


def test_subfolders_are_classes(folder):
    data = ImageFolder(folder)
    assert data.metainfo == {"classes": ("cat", "dog")}
    assert [label for _, label in data.items] == [0, 0, 0, 1, 1, 1]
    sample = data[2]
    assert sample["labels"] == 0
    assert sample["inputs"].shape == (3, 10, 12)
    assert sample["inputs"].dtype is torch.uint8
    assert sample["inputs"][:, 0, 0].tolist() == [200, 20, 0]
    assert ImageFolder(folder, channels=1)[0]["inputs"].shape == (1, 10, 12)


def test_classes_can_be_chosen(folder):
    data = ImageFolder(folder, classes=["dog"])
    assert len(data) == 3
    assert {label for _, label in data.items} == {0}
    with pytest.raises(KeyError, match=r"has no class 'dgo'; did you mean 'dog'\? Known: cat, dog"):
        ImageFolder(folder, classes=["dgo"])


def test_invalid_folders(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere.*one subfolder of pictures per class"):
        ImageFolder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="has no subfolders"):
        ImageFolder(folder / "dog")
    (folder / "mouse").mkdir()
    with pytest.raises(ValueError, match=r"no pictures in .*mouse"):
        ImageFolder(folder)


@pytest.fixture
def logged(monkeypatch):
    """The lines that a dataset logs."""
    lines = []
    monkeypatch.setattr(
        "resbackbone.training.classification.datasets.print_log", lambda text, **options: lines.append(text)
    )
    return lines


def test_symbolic_links_are_followed_without_loops(folder, tmp_path, logged):
    far = tmp_path / "far"
    (folder / "dog").rename(far)
    (folder / "dog").symlink_to(far)  # a class
    (folder / "cat/more").rename(tmp_path / "more")
    (folder / "cat/more").symlink_to(tmp_path / "more")  # a folder within one
    (folder / "cat/up").symlink_to(folder)
    (folder / "all").symlink_to(folder)
    (far / "again").symlink_to(far)
    data = ImageFolder(folder)
    assert data.metainfo == {"classes": ("cat", "dog")}
    assert [label for _, label in data.items] == [0, 0, 0, 1, 1, 1]
    assert logged == []


def test_skipped_files_are_logged_once(folder, logged):
    for name in ("cat", "dog"):
        (folder / name / "a.heic").touch()
        (folder / name / "b.png").symlink_to("gone.png")
    (folder / "mouse").symlink_to("gone")
    Image.new("RGB", (4, 4)).save(folder / "beside.png")
    data = ImageFolder(folder)
    assert len(data) == 6
    for count, reason, name in (
        (2, "as Pillow cannot read .heic here (pip install pillow-heif)", "cat/a.heic"),
        (3, "a broken link", "mouse"),
        (1, "not in a class folder", "beside.png"),
    ):
        (line,) = (line for line in logged if reason in line)
        assert line.startswith(f"{count} skipped, {reason}: ")
        assert f"{folder / name}'" in line


def test_unreadable_picture(folder, caplog):
    (folder / "cat" / "1.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(UnreadablePictureError, match=r"cannot read picture .*cat/1.png"):
        ImageFolder(folder)[1]
    replaced = ImageFolder(folder, unreadable="replace")
    torch.testing.assert_close(replaced[1], replaced[2])
    for path, _ in replaced.items:
        Path(path).write_bytes(b"")
    with pytest.raises(UnreadablePictureError, match=r"no picture in .* can be read"):
        replaced[0]


def test_seed_determines_augmentation(folder):
    def change(picture, rng):
        return Image.new("L", (1, 1), rng.randrange(256))

    data = ImageFolder(folder, transforms=[change])
    values = [int(data[SeededIndex(0, seed)]["inputs"]) for seed in range(20)]
    assert len(set(values)) > 10
    assert values == [int(data[SeededIndex(0, seed)]["inputs"]) for seed in range(20)]
    assert int(data[0]["inputs"]) == values[0]


def test_allow_empty(folder):
    (folder / "mouse").mkdir()
    data = ImageFolder(folder, classes=["mouse", "cat", "elk", "dog"], allow_empty=True)
    assert data.metainfo == {"classes": ("mouse", "cat", "elk", "dog")}
    assert [label for _, label in data.items] == [1, 1, 1, 3, 3, 3]
    with pytest.raises(KeyError, match="or allow_empty=True"):
        ImageFolder(folder, classes=["elk"])
    with pytest.raises(ValueError, match=r"no pictures in .*, in the folders elk, mouse"):
        ImageFolder(folder, classes=["elk", "mouse"], allow_empty=True)
