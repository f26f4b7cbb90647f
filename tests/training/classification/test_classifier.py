"""Image classifier: outputs, preprocessing and weights."""

import command_line
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from resbackbone import build_backbone
from resbackbone.checkpoints import convert_state_dict, load_checkpoint
from resbackbone.data.preprocessing import CAFFE, TORCHVISION, Preprocessing
from resbackbone.training.classification import (
    ImageClassifier,
)
from resbackbone.training.engine import BatchTooSmallError

SMALL = {"type": "ResNet", "depth": 18, "base_channels": 8, "stem_channels": 8}


def test_outputs_equal_torchvision(torchvision, images):
    reference = torchvision.models.resnet18(num_classes=7).eval()
    model = ImageClassifier("resnet18", num_classes=7).eval()
    converted = convert_state_dict(model.state_dict(), target="torchvision")
    reference.load_state_dict(converted)
    with torch.no_grad():
        torch.testing.assert_close(model(images), reference(images), rtol=1e-5, atol=1e-5)


def test_pools_last_output(images):
    model = ImageClassifier({**SMALL, "out_indices": (0, 2)}, num_classes=3).eval()
    features = model.backbone(images)[-1]
    assert features.shape[1] == model.fc.in_features == 32
    torch.testing.assert_close(model(images), features.mean((2, 3)) @ model.fc.weight.T + model.fc.bias)


def test_forward_modes(images):
    model = ImageClassifier(SMALL, num_classes=3).eval()
    labels = torch.tensor([2, 0])
    logits = model(images)
    assert logits.shape == (2, 3)
    torch.testing.assert_close(model(images, labels, mode="loss"), {"loss": F.cross_entropy(logits, labels)})
    predicted = model(images, labels, mode="predict")
    torch.testing.assert_close(torch.stack([sample["scores"] for sample in predicted]), logits)
    with pytest.raises(TypeError, match="mode='loss' needs `labels`, got None"):
        model(images, mode="loss")
    with pytest.raises(ValueError, match=r"`mode` must be one of 'tensor', 'loss', 'predict'; got 'train'"):
        model(images, mode="train")


def test_single_value_per_channel_names_drop_last():
    model = ImageClassifier(SMALL, num_classes=3).train()
    words = r"images \(1, 3, 32, 32\) give feature maps of one pixel, .* drop_last=True of the data loader drops a last"
    with pytest.raises(BatchTooSmallError, match=words):
        model(torch.randn(1, 3, 32, 32), torch.tensor([0]), mode="loss")
    model(torch.randn(1, 3, 64, 64), torch.tensor([0]), mode="loss")
    model.eval()(torch.randn(1, 3, 32, 32))


def test_norm_eval_defaults_to_false():
    assert not ImageClassifier("resnet18", num_classes=2).backbone.norm_eval
    assert ImageClassifier({**SMALL, "norm_eval": True}, num_classes=2).backbone.norm_eval


@pytest.mark.parametrize(
    ("backbone", "options", "expected"),
    [
        (SMALL, {}, TORCHVISION),
        ({**SMALL, "depth": 50, "style": "caffe"}, {}, CAFFE),
        ({**SMALL, "in_channels": 1}, {}, TORCHVISION.gray()),
        (SMALL, {"preprocessing": {"mean": (1.0, 2.0, 3.0), "std": (4.0, 5.0, 6.0), "order": "BGR"}}, None),
    ],
)
def test_images_are_normalized_for_the_weights(backbone, options, expected, photograph):
    expected = expected or Preprocessing(**options["preprocessing"])
    model = ImageClassifier(backbone, num_classes=2, **options)
    picture = photograph if len(expected.mean) == 3 else photograph.convert("L")
    pixels = torch.from_numpy(np.array(picture)).reshape(60, 80, -1).permute(2, 0, 1)[None]
    batch = model.data_preprocessor({"inputs": pixels, "labels": torch.tensor([1])})
    torch.testing.assert_close(batch["inputs"], expected(picture))
    assert batch["labels"].tolist() == [1]


def test_pretrained_weights_set_preprocessing(tmp_path):
    torch.save(convert_state_dict(build_backbone("resnet50").state_dict(), target="detectron2"), tmp_path / "net.pth")
    backbone = {"type": "ResNet", "depth": 50, "init_cfg": {"type": "Pretrained", "checkpoint": tmp_path / "net.pth"}}
    model = ImageClassifier(backbone, num_classes=2)
    model.init_weights()
    assert model.data_preprocessor.mean.flatten().tolist() == pytest.approx(CAFFE.mean)
    assert model.data_preprocessor.channels.tolist() == [2, 1, 0]
    fixed = ImageClassifier(backbone, num_classes=2, preprocessing={"order": "RGB"})
    fixed.init_weights()
    assert fixed.data_preprocessor.channels.tolist() == [0, 1, 2]


def test_load_weights_of_a_run(tmp_path, images, randomize_norms):
    odd = {"mean": (1.0, 2.0, 3.0), "std": (4.0, 5.0, 6.0), "order": "BGR"}
    trained = randomize_norms(ImageClassifier(SMALL, num_classes=3, preprocessing=odd)).eval()
    other = {f"module.{key}": value + 1 for key, value in trained.state_dict().items()}
    torch.save({"meta": {}, "state_dict": trained.state_dict(), "ema_state_dict": other}, tmp_path / "run.pth")

    model = ImageClassifier(SMALL, num_classes=3).eval()
    model.load_weights(tmp_path / "run.pth")
    torch.testing.assert_close(dict(model.state_dict()), dict(trained.state_dict()), rtol=0, atol=0)

    net = build_backbone(SMALL)
    load_checkpoint(net, tmp_path / "run.pth")
    assert net.preprocessing == Preprocessing(**odd)

    command_line.run("convert", tmp_path / "run.pth", tmp_path / "torchvision.pth", "--to", "torchvision")
    converted = torch.load(tmp_path / "torchvision.pth")
    torch.testing.assert_close(converted["fc.weight"], trained.fc.weight.detach(), rtol=0, atol=0)
    assert not [key for key in converted if "." not in key or key.startswith(("backbone", "data"))]


def test_load_weights_of_torchvision(torchvision, tmp_path, images):
    reference = torchvision.models.resnet18(num_classes=4).eval()
    torch.save(reference.state_dict(), tmp_path / "torchvision.pth")
    model = ImageClassifier("resnet18", num_classes=4).eval()
    model.load_weights(tmp_path / "torchvision.pth")
    with torch.no_grad():
        torch.testing.assert_close(model(images), reference(images), rtol=1e-5, atol=1e-5)
    model = ImageClassifier("resnet18", num_classes=5)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"nothing was loaded: fc.weight is \(4, 512\) instead of \(5, 512\), 1 more"):
        model.load_weights(tmp_path / "torchvision.pth")
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


def test_mixup_cutmix_applies_to_the_loss_only(images):
    model = ImageClassifier(SMALL, num_classes=3, mixup_cutmix={"mixup_alpha": 5.0}).eval()
    labels = torch.tensor([0, 1])
    plain = F.cross_entropy(model(images), labels)
    assert not torch.isclose(model(images, labels, mode="loss")["loss"], plain)
    torch.testing.assert_close(model(images, labels, mode="predict")[0]["scores"], model(images)[0])
