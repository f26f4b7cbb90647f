"""Run trainings in subprocesses that can be killed; a fork server with preloaded imports starts them fast."""

import json
import multiprocessing
import os
import socket
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

CONFIGS = Path(__file__).parents[2] / "configs" / "classification"
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["resbackbone.training.classification", "resbackbone.training.engine"])

# A minimal model and dataset with every source of random numbers.
CONFIG = f"""
_base_ = [{str(CONFIGS / "_base_.py")!r}]

model = dict(
    type="ImageClassifier",
    backbone=dict(
        type="ResNet_CIFAR",
        depth=18,
        base_channels=4,
        stem_channels=4,
        num_stages=2,
        strides=(1, 2),
        dilations=(1, 1),
        out_indices=(1,),
        drop_path_rate=0.2,
    ),
    num_classes=2,
    mixup_cutmix=dict(mixup_alpha=0.5, cutmix_alpha=1.0),
)
train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    sampler=dict(type="EpochSampler"),
    collate_fn=dict(type="default_collate"),
    dataset=dict(
        type="ImageFolder",
        root="pictures",
        transforms=[dict(type="RandomResizedCrop", size=8), dict(type="RandAugment")],
    ),
)
val_dataloader = dict(
    batch_size=16,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="default_collate"),
    dataset=dict(type="ImageFolder", root="pictures", transforms=[dict(type="Resize", size=(8, 8))]),
)
test_dataloader = val_dataloader
optim_wrapper = dict(optimizer=dict(type="AdamW", lr=1e-3, weight_decay=0.05), clip_grad=dict(max_norm=1.0))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=7),
    dict(type="CosineAnnealingLR", begin=1, end=3, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=3)
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=2), logger=dict(interval=1))
custom_hooks = [
    dict(type="ClassCheckHook"),
    dict(type="FiniteLossHook"),
    dict(type="CurvesHook"),
    dict(type="EMAHook", momentum=0.1),
]
"""


def prepare(folder, config=CONFIG):
    """Write the config and 22 pictures of two classes, dark and bright: 6 batches of 4."""
    noise = np.random.default_rng(0)
    for name, low in (("dark", 0), ("bright", 100)):
        (folder / "pictures" / name).mkdir(parents=True)
        for index in range(11):
            pixels = noise.integers(low, low + 150, (10, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "pictures" / name / f"{index}.png")
    (folder / "config.py").write_text(config)


def start(folder, *arguments, before=None, output="output"):
    """Start the ``resbackbone`` command in a subprocess.

    Args:
        folder: Working directory.
        arguments: Arguments of the command.
        before: A function of a module that the process calls first.
        output: File in the folder for stdout and stderr.
    """
    process = _CONTEXT.Process(target=_command, args=(str(folder), [str(a) for a in arguments], before, output))
    process.start()
    return process


def run(folder, *arguments, before=None, status=0):
    """Run the command to its end; return its output."""
    process = start(folder, *arguments, before=before)
    process.join()
    output = (Path(folder) / "output").read_text()
    assert process.exitcode == status, output
    return output


def train(folder, work_dir, *arguments, **options):
    """Run ``resbackbone train`` on the config written by :func:`prepare`."""
    return run(folder, "train", "config.py", "--work-dir", work_dir, *arguments, **options)


def _command(folder, arguments, before, output):
    os.chdir(folder)
    # A file keeps the output of a killed process, and of libraries that write to the descriptors.
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    torch.set_num_threads(1)
    if before is not None:
        before()
    from resbackbone.cli import app

    app(arguments, prog_name="resbackbone")


def last_checkpoint(work_dir):
    """Read the checkpoint that a run would resume from, by PyTorch's safe loading."""
    return torch.load(Path(work_dir, "last_checkpoint").read_text(), weights_only=True)


def state(work_dir):
    """Return the final state of a training without times: weights, averages, optimizer, schedules and curves."""
    checkpoint = last_checkpoint(work_dir)
    logs = checkpoint["message_hub"]["log_scalars"]
    return {
        **{key: value for key, value in checkpoint.items() if key not in ("meta", "message_hub")},
        "logs": {name: log for name, log in logs.items() if not name.endswith("time")},
        "counts": [checkpoint["meta"][key] for key in ("epoch", "iter")],
        "curves": curves(work_dir),
    }


def curves(work_dir):
    """Return the curves without times."""
    records = [json.loads(line) for line in (Path(work_dir) / "curves.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if not key.endswith("time")} for record in records]


def assert_same(found, expected, note=""):
    """Assert that two states are bit-identical."""
    assert set(found) == set(expected), note
    for key in expected:
        if key in ("param_schedulers", "counts", "curves"):
            assert found[key] == expected[key], f"{note}{key}"
        else:
            torch.testing.assert_close(
                found[key], expected[key], rtol=0, atol=0, msg=lambda text, key=key: f"{note}{key}: {text}"
            )


def free_port():
    """Return an unused port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
