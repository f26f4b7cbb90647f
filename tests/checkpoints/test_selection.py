"""Selection of one backbone of a checkpoint that has several, and the errors if there is none."""

import itertools
import random
import re
import warnings
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from resbackbone import ResNet
from resbackbone.checkpoints import convert_state_dict, load_checkpoint
from resbackbone.checkpoints.conversion import find_backbone
from resbackbone.checkpoints.selection import unwrap
from resbackbone.cli import app
from resbackbone.necks import FPN

# The selected prefix and the other one, as each project evaluates, or loads by default.
PAIRS = [
    ("ema.module.backbone.", "model.backbone."),  # RT-DETR and what is built on it
    ("state_dict_ema.", "state_dict."),  # timm
    ("model_ema.", "model."),  # timm, torchvision's references
    ("ema.", "model."),
    ("ema_model.", "model."),
    ("ema_model.module.", "online_model."),
    ("ema_model.", ""),
    ("shadow.", "model."),
    ("ema_net.", "net."),  # super-gradients
    ("ema_state_dict.", "state_dict."),
    ("modelEMA.", "model."),
    ("swa_model.module.", "model."),
    ("state_dict.teacher.backbone.", "state_dict.student.backbone."),  # mmdet's semi-supervised detectors
    ("teacher.backbone.", "student.module.backbone."),  # DINO
    ("modelTeacher.backbone.bottom_up.", "modelStudent.backbone.bottom_up."),  # Unbiased Teacher
    ("teacher_backbone.", "student_backbone."),  # lightly
    ("module.encoder_q.", "module.encoder_k."),  # MoCo
    ("encoder_q.0.", "encoder_k.0."),  # mmselfsup
    ("backbone.", "encoder_k.module.0."),  # mmpretrain
    ("module.base_encoder.", "module.momentum_encoder."),  # MoCo v3
    ("state_dict.backbone.", "state_dict.momentum_backbone."),  # solo-learn
    ("state_dict.backbone.", "state_dict.backbone_momentum."),  # lightly
    ("online_network.encoder.", "target_network.encoder."),  # BYOL
    ("online_encoder.net.", "target_encoder.net."),
    ("query_encoder.", "key_encoder."),
    ("q_encoder.", "k_encoder."),
    ("backbone.", "target_net.module.0."),
    ("visual_encoder.", "visual_encoder_m."),  # ALBEF
    ("state_dict.", "current_model_state."),  # Lightning's averaging
    ("state_dict_ema.encoder_q.", "state_dict.encoder_q."),
    ("state_dict.encoder_q.", "state_dict_ema.encoder_k."),
]
COUNTERS, HEADS = "num_batches_tracked", {"fc.weight": torch.zeros(3, 4), "fc.bias": torch.zeros(3)}


SIZE = {"base_channels": 2, "num_stages": 2, "strides": (1, 2), "dilations": (1, 1), "out_indices": (1,)}


def tiny(value, depth=18):
    return {key: torch.full_like(tensor, value) for key, tensor in ResNet(depth, **SIZE).state_dict().items()}


def below(prefix, weights, *, counters=True, heads=False):
    kept = {key: value for key, value in weights.items() if counters or not key.endswith(COUNTERS)}
    return {f"{prefix}{key}": value for key, value in (kept | (HEADS if heads else {})).items()}


@pytest.mark.parametrize(("right", "wrong"), PAIRS)
def test_the_role_decides(right, wrong):
    """In any order, and with counters or heads in either one."""
    for first, *flags in itertools.product((0, 1), (False, True), (False, True), (False, True), (False, True)):
        one = below(right, tiny(1), counters=flags[0], heads=flags[1])
        two = below(wrong, tiny(2), counters=flags[2], heads=flags[3])
        found = find_backbone(two | one if first else one | two)
        assert (found.prefix, found.other_prefixes) == (right, (wrong,))
        assert all((value == 1).all() for key, value in found.native.items() if not key.startswith("fc."))


@pytest.mark.parametrize(("right", "wrong"), PAIRS)
def test_a_warning_names_both_and_how_to_choose(tmp_path, right, wrong):
    torch.save(below(wrong, tiny(2)) | below(right, tiny(1)), tmp_path / "m.pth")
    net = ResNet(18, **SIZE)
    with pytest.warns(UserWarning, match="copies of these weights") as caught:
        report = load_checkpoint(net, tmp_path / "m.pth")
    assert repr(right) in str(caught[0].message)
    assert f"prefix={wrong!r}" in str(caught[0].message)
    assert f"not the backbone with prefix {wrong!r}" in report.adapted
    assert (net.conv1.weight == 1).all()
    for prefix, value in ((wrong, 2), (right, 1)):
        load_checkpoint(net, tmp_path / "m.pth", prefix=prefix)  # and no warning
        assert (net.conv1.weight == value).all()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            converted = convert_state_dict(torch.load(tmp_path / "m.pth"), prefix=prefix)
        assert (converted["conv1.weight"] == value).all()
    with pytest.warns(UserWarning, match="copies of these weights"):
        convert_state_dict(torch.load(tmp_path / "m.pth"))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_order_of_the_tensors_matters(data):
    prefixes = data.draw(
        st.lists(st.sampled_from(sorted({one for pair in PAIRS for one in pair})), min_size=2, max_size=4, unique=True)
    )
    chosen = set()
    for seed in range(3):
        tensors = {}
        for value, prefix in enumerate(prefixes):
            flags = {"counters": data.draw(st.booleans()), "heads": data.draw(st.booleans())}
            tensors |= below(prefix, tiny(value), **flags)
        names = list(tensors)
        random.Random(seed).shuffle(names)
        chosen.add(find_backbone({name: tensors[name] for name in names}).prefix)
    assert len(chosen) == 1


@pytest.mark.parametrize("marks", [{"meta": {"epoch": 1}}, {"meta": {}, "message_hub": {}}])
def test_the_plain_files_of_mmengine_keep_their_state_dict(tmp_path, marks):
    weights = {"state_dict": below("backbone.", tiny(1)), "ema_state_dict": below("backbone.", tiny(2)), **marks}
    torch.save(weights, tmp_path / "m.pth")
    net = ResNet(18, **SIZE)
    report = load_checkpoint(net, tmp_path / "m.pth")  # and no warning
    assert "not the backbone with prefix 'ema_state_dict.backbone.'" in report.adapted
    assert (net.conv1.weight == 1).all()
    load_checkpoint(net, tmp_path / "m.pth", prefix="ema_state_dict.backbone.")
    assert (net.conv1.weight == 2).all()


def test_mmengines_own_hook_swaps(tmp_path):
    """It saves the averaged weights in ``state_dict``."""
    hooks, model = pytest.importorskip("mmengine.hooks"), pytest.importorskip("mmengine.model")

    class Runner:
        model = torch.nn.ModuleDict({"backbone": ResNet(18, **SIZE)})

    class Hook(hooks.EMAHook):
        ema_model = model.ExponentialMovingAverage(Runner.model, momentum=0.5)

        def __init__(self):
            self.src_model = Runner.model

    raw, averaged = (value.conv1.weight for value in (Runner.model.backbone, Hook.ema_model.module.backbone))
    torch.nn.init.constant_(raw, 2.0)
    torch.nn.init.constant_(averaged, 1.0)
    content = {"state_dict": Runner.model.state_dict()}
    Hook().before_save_checkpoint(Runner, content)
    torch.save(content, tmp_path / "m.pth")
    net = ResNet(18, **SIZE)
    report = load_checkpoint(net, tmp_path / "m.pth")
    assert "not the backbone with prefix 'ema_state_dict.module.backbone.'" in report.adapted
    assert (net.conv1.weight == 1).all()


@pytest.mark.parametrize("lacking", ["running_", "bn1", "conv1.weight"])
def test_an_average_without_statistics_or_stem_ranks_last(lacking):
    part = {key: value for key, value in tiny(2).items() if lacking not in key or key.startswith("layer1.0.conv1")}
    for tensors in (
        below("model.", tiny(1)) | below("shadow.", part),
        below("shadow.", part) | below("model.", tiny(1)),
    ):
        found = find_backbone(tensors)
        assert (found.prefix, found.other_prefixes) == ("model.", ("shadow.",))


def test_a_small_student_does_not_lack_what_its_teacher_has_more():
    teacher = tiny(0, depth=34)
    assert find_backbone(below("teacher.", teacher) | below("student.", tiny(1))).prefix == "teacher."
    assert find_backbone(below("ema_model.", tiny(1)) | below("model.", teacher)).prefix == "ema_model."


def test_the_classifier_is_that_of_the_selected_backbone():
    raw, averaged = below("", tiny(2) | {"fc.weight": torch.ones(3, 4) * 2}), below("ema_model.", tiny(1))
    assert "fc.weight" not in find_backbone(raw | averaged).native
    averaged["ema_model.fc.weight"] = torch.ones(3, 4)
    for tensors in (raw | averaged, averaged | raw):
        assert (find_backbone(tensors).native["fc.weight"] == 1).all()


def test_equal_copies_are_no_choice(tmp_path):
    torch.save(below("backbone.", tiny(1)) | below("encoder_k.0.", tiny(1)), tmp_path / "m.pth")
    assert load_checkpoint(ResNet(18, **SIZE), tmp_path / "m.pth").adapted == ("backbone with prefix 'backbone.'",)


def test_of_two_parts_of_one_model_the_report_tells():
    """Without roles the larger one is selected, then the shorter prefix, in any order."""
    two = below("img_backbone.", tiny(2)), below("backbone.", tiny(1))
    assert find_backbone(two[0] | two[1]).prefix == find_backbone(two[1] | two[0]).prefix == "backbone."
    deeper = below("img_backbone.", tiny(3, depth=34))
    assert find_backbone(two[1] | deeper).prefix == find_backbone(deeper | two[1]).prefix == "img_backbone."


@pytest.mark.parametrize(
    ("right", "wrong"), [("ema.module.", "model."), ("teacher.", "student."), ("state_dict_ema.", "state_dict.")]
)
@pytest.mark.parametrize("flip", [False, True])
def test_a_neck_comes_from_the_same_copy_as_its_backbone(tmp_path, right, wrong, flip):
    own = FPN(in_channels=[4], out_channels=4, num_outs=1).state_dict()
    one, two = (
        {f"{prefix}neck.{key}": torch.full_like(tensor, value) for key, tensor in own.items()}
        for prefix, value in ((right, 1), (wrong, 2))
    )
    torch.save(two | one if flip else one | two, tmp_path / "m.pth")
    neck = FPN(
        in_channels=[4],
        out_channels=4,
        num_outs=1,
        init_cfg={"type": "Pretrained", "checkpoint": str(tmp_path / "m.pth")},
    )
    with pytest.warns(UserWarning, match="copies of these weights"):
        neck.init_weights()
    assert all((tensor == 1).all() for tensor in neck.state_dict().values())


# Wrappers inside of keys

WRAPPERS = ["_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_forward_module", "module"]


def wrap(name, places, rng):
    parts = name.split(".")
    for place in sorted(places, reverse=True):
        if place < len(parts):
            parts[place:place] = rng.sample(WRAPPERS, rng.randint(1, 2))
    return ".".join(parts)


@pytest.mark.parametrize(
    "layout", ["native", "detectron2", "huggingface", "paddle", "rtdetr", "mmaction2", "cifar", "sequential"]
)
@pytest.mark.parametrize("places", [(0,), (1,), (2,), (3,), (0, 1, 2, 3)])
def test_wrappers_inside_of_keys_are_removed(layout, places):
    weights = {key: value for key, value in tiny(1).items() if not key.endswith(COUNTERS)}
    theirs = convert_state_dict(weights, "native", layout)
    rng = random.Random(0)
    head = rng.sample(WRAPPERS, 2)  # what wraps the whole is the same in every name
    inner = [place for place in places if place]
    wrapped = {
        ".".join([*(head if 0 in places else []), "backbone", wrap(key, inner, rng)]): value
        for key, value in theirs.items()
    }
    native = convert_state_dict(wrapped)
    assert native.keys() == weights.keys()


def test_pytorchs_own_wrappers(tmp_path):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    net = ResNet(18, **SIZE)
    expected = {key: value.clone() for key, value in net.state_dict().items()}
    net.layer1 = torch.compile(net.layer1)
    net.layer2[0] = torch.nn.DataParallel(net.layer2[0])
    net.layer2[1] = checkpoint_wrapper(torch.compile(net.layer2[1]))
    whole: Any = torch.compile(torch.nn.DataParallel(net))
    assert any("_orig_mod.module.layer1._orig_mod." in key for key in whole.state_dict())
    torch.save(whole.state_dict(), tmp_path / "m.pth")
    fresh = ResNet(18, **SIZE)
    load_checkpoint(fresh, tmp_path / "m.pth", strict="all")
    assert all(torch.equal(value, expected[key]) for key, value in fresh.state_dict().items())


def test_two_keys_of_one_tensor_are_reported(tmp_path):
    torch.save(tiny(1) | {"layer1.0._orig_mod.conv1.weight": torch.zeros(2, 2, 3, 3)}, tmp_path / "m.pth")
    with pytest.raises(ValueError, match=r"1 unexpected.*layer1\.0\._orig_mod\.conv1\.weight"):
        load_checkpoint(ResNet(18, **SIZE), tmp_path / "m.pth")


def test_nothing_else_is_removed():
    assert unwrap("se_module.module_list.0.weight") == "se_module.module_list.0.weight"


# Missing backbones


def test_a_prefix_that_is_not_there_is_named_with_those_that_are(tmp_path):
    torch.save({"state_dict": below("backbone.", tiny(1)) | below("img_backbone.", tiny(2))}, tmp_path / "m.pth")
    with pytest.raises(
        ValueError, match=r"with prefix 'encoder\.'.*'state_dict\.backbone\.' .*'state_dict\.img_backbone\.'"
    ):
        load_checkpoint(ResNet(18, **SIZE), tmp_path / "m.pth", prefix="encoder.")
    with pytest.raises(ValueError, match=r"with prefix ''.*'state_dict\.backbone\.'"):
        load_checkpoint(ResNet(18, **SIZE), tmp_path / "m.pth", prefix="")


@pytest.mark.parametrize(
    "prefix", ["img_backbone", "img_backbone.", "state_dict.img_backbone.", "state_dict.img_backbone"]
)
def test_a_prefix_may_be_a_part_and_end_without_its_dot(tmp_path, prefix):
    torch.save({"state_dict": below("backbone.", tiny(1)) | below("img_backbone.", tiny(2))}, tmp_path / "m.pth")
    net = ResNet(18, **SIZE)
    load_checkpoint(net, tmp_path / "m.pth", prefix=prefix)
    assert (net.conv1.weight == 2).all()


def test_without_any_backbone_the_prefixes_are_named(tmp_path):
    torch.save({"decoder.x.weight": torch.zeros(1), "head.y": torch.zeros(1)}, tmp_path / "m.pth")
    with pytest.raises(ValueError, match=r"with prefix 'encoder\.'.* prefixes are: decoder\., head\."):
        load_checkpoint(ResNet(18, **SIZE), tmp_path / "m.pth", prefix="encoder.")
    torch.save({}, tmp_path / "m.pth")
    with pytest.raises(ValueError, match="no known backbone is among the keys; the first keys are: none"):
        load_checkpoint(ResNet(18, **SIZE), tmp_path / "m.pth")


def test_another_layout_names_the_one_that_is_there(tmp_path):
    torch.save(below("backbone.", tiny(1)), tmp_path / "m.pth")
    with pytest.raises(
        ValueError, match=r"no paddle backbone is among the keys; there is one with prefix 'backbone\.' \(native"
    ):
        load_checkpoint(ResNet(18, **SIZE), tmp_path / "m.pth", layout="paddle")
    with pytest.raises(KeyError, match="unknown layout 'padle'; did you mean 'paddle'"):
        load_checkpoint(ResNet(18, **SIZE), tmp_path / "m.pth", layout="padle")


def test_the_commands_choose_by_prefix(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": tiny(2), "ema": {"module": tiny(1)}}, "m.pth")
    runner = CliRunner()
    for options, value in (([], 1), (["--prefix", "model."], 2)):
        result = runner.invoke(app, ["convert", "m.pth", "out.pth", "--to", "native", *options])
        assert result.exit_code == 0, result.output
        assert ("choose with --prefix" in result.output) is (not options)
        assert (torch.load("out.pth")["conv1.weight"] == value).all()
    for command in (["convert", "m.pth", "out.pth", "--to", "native"], ["load-report", "resnet18", "m.pth"]):
        result = runner.invoke(app, [*command, "--prefix", "encoder."])
        assert result.exit_code == 2
        assert re.search(r"with prefix 'encoder\.'.*'ema\.module\.' .*'model\.'", result.output)


def test_convert_names_copies_alone(tmp_path, monkeypatch):
    """A backbone of the same role is another part of one model, without a choice to make."""
    monkeypatch.chdir(tmp_path)
    torch.save(below("backbone.", tiny(1)) | below("img_backbone.", tiny(2)), "m.pth")
    result = CliRunner().invoke(app, ["convert", "m.pth", "out.pth", "--to", "native"])
    assert result.exit_code == 0, result.output
    assert "--prefix" not in result.output
    assert (torch.load("out.pth")["conv1.weight"] == 1).all()


def test_parametrized_weights_are_named_as_that(tmp_path):
    net = ResNet(18, **SIZE)
    torch.nn.utils.parametrizations.weight_norm(net.layer1[1].conv1)
    torch.save(net.state_dict(), tmp_path / "m.pth")
    with pytest.raises(ValueError, match="remove_parametrizations"):
        load_checkpoint(ResNet(18, **SIZE), tmp_path / "m.pth")


@pytest.mark.parametrize("prefix", [1, b"backbone.", ["backbone."]])
def test_a_prefix_is_text(tmp_path, prefix):
    torch.save(tiny(1), tmp_path / "m.pth")
    with pytest.raises(TypeError, match="`prefix` must be"):
        load_checkpoint(ResNet(18, **SIZE), tmp_path / "m.pth", prefix=prefix)


STATES = ["optim.exp_avg.", "optimizer_state_dict.exp_avg.", "optimizer_state.momentum_buffer.", "optimizerG.x."]
STATES += ["exp_avg.", "exp_avg_sq.", "opt.max_exp_avg_sq.", "square_avg.", "opt_state.mu.", "acc_delta.", "velocity."]
STATES += ["grads.", "grad.", "gradients.module.", "momentum_buffer."]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("state", STATES)
def test_optimizer_states_and_gradients_are_not_weights(tmp_path, state, nested):
    """They have the keys and the shapes of the weights."""

    def content(prefix, weights):
        top, _, inner = prefix.removesuffix(".").partition(".")
        return {top: {inner: weights} if inner else weights} if nested else below(prefix, weights)

    net = ResNet(18, **SIZE)
    torch.save(content(state, tiny(2)) | content("model.", tiny(1)), tmp_path / "m.pth")
    load_checkpoint(net, tmp_path / "m.pth")  # and no warning
    assert (net.conv1.weight == 1).all()
    torch.save(content(state, tiny(2)) | {"epoch": 1}, tmp_path / "alone.pth")
    with pytest.raises(ValueError, match=r"no known backbone is among the keys|no tensors"):
        load_checkpoint(net, tmp_path / "alone.pth")


def test_a_prefix_can_name_gradients():
    found = find_backbone(below("model.", tiny(1)) | below("grads.", tiny(2)), prefix="grads.")
    assert (found.native["conv1.weight"] == 2).all()


@pytest.mark.parametrize("wrapper", ["module.", ""])
def test_a_script_with_mmengines_words_does_not_swap(tmp_path, wrapper):
    content = {"epoch": 3, "state_dict": below(wrapper, tiny(1)), "ema_state_dict": below(wrapper, tiny(2))}
    torch.save(content, tmp_path / "m.pth")
    net = ResNet(18, **SIZE)
    with pytest.warns(UserWarning, match="2 copies of these weights: the one with prefix 'ema_state_dict"):
        load_checkpoint(net, tmp_path / "m.pth")
    assert (net.conv1.weight == 2).all()
