"""Write docs/upstream_defects.md: the numbered defects of OpenMMLab's ResNets, from the tests that guard against them.

A test belongs to a defect by its name, ``test_defect_07_...``; its docstring says what is wrong upstream and what is
right. Run it after such a test was added or changed: ``python tools/upstream_defects.py``.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "upstream_defects.md"
INTRODUCTION = """\
# Defects of OpenMMLab's ResNets

What is wrong in mmdet 3.3.0, mmseg 1.2.2, mmpretrain 1.2.0, mmcv 2.1.0 and mmengine 0.10.7, and right here. Each is
guarded by tests: `pytest -k defect_07` runs those of number 7. What else differs is in [differences](differences.md).

`python tools/upstream_defects.py` writes this page from the tests' docstrings; change those.
"""


@dataclass(frozen=True)
class Defect:
    """One entry of the list.

    Attributes:
        title: What goes wrong, in a line.
        details: Markdown below it.
        remains: What of it is not for us to repair, and why.
    """

    title: str
    remains: str = ""
    details: str = ""


@dataclass(frozen=True)
class Case:
    """A test that guards against a defect; ``path`` is relative to the repository."""

    number: int
    name: str
    path: str
    text: str


OPERATORS = """\
Largest differences on CPUs between a map in channels_last and the same one contiguous, of mmcv 2.1.0 and onedl-mmcv
2.3.6 alike, for random maps of `tests/support/mmcv_operators.py`; behind one of our integrations all are 0, but for
SAConv2d's.

| operator | outputs | gradients |
|---|---|---|
| `roi_align`, average / maximum | 0.43 / 0.46 | 0 / 0.78 |
| `roi_align_rotated` | 0.53 | 0 |
| `bezier_align` | 0.45 | 0 |
| `rotated_feature_align` | 0.81 | 11.5 |
| `modulated_deform_conv2d` (DCNv2) | 9.1 | 11 |
| `deform_conv2d` (DCN), `SAConv2d` with `use_deform` | RuntimeError: input must be contiguous | |
| `psa_mask`, collect and distribute | RuntimeError: view size is not compatible | |
| `SAConv2d` | 0 | 2.9e-6 |
| `upfirdn2d`, `bias_act`, `filtered_lrelu` | 0 | 0 |
| `CrissCrossAttention`, `CornerPool`, `point_sample`, `SimpleRoIAlign` | 0 | 0 |
| `roi_pool`, `riroi_align_rotated`, `deform_roi_pool`, `border_align` | not there for CPUs | |
| `masked_conv2d`, `carafe`, `correlation`, `tin_shift`, `sigmoid_focal_loss` | not there for CPUs | |
"""
DEFECTS = {
    1: Defect("Of several plugins at one position only the last runs"),
    2: Defect("`fallback_on_stride` is taken out of the caller's config, so that one block falls back"),
    3: Defect("`zero_init_residual` is ignored for subclassed blocks and beside `init_cfg`"),
    4: Defect("Plugins are built for a width that they do not meet"),
    5: Defect("The last stage of TridentNet is not initialized"),
    6: Defect("The last stage of TridentNet fails under `with_cp`, and its `dcn` is dropped"),
    7: Defect("RegNet changes the expansion of every other bottleneck, and cannot freeze a deep stem"),
    8: Defect("DetectoRS draws what should start at zero, and builds its layers twice"),
    9: Defect("Res2Net ignores `style`, `deep_stem` and `avg_down`"),
    10: Defect("`se_ratio`, `drop_path_rate` and `init_cfg` are taken and not used"),
    11: Defect("Loaded weights are zeroed afterwards"),
    12: Defect(
        "An integer drop path rate fails, and `get_layer_depth` knows five depths only",
    ),
    13: Defect("SyncBN goes on training under `norm_eval`"),
    14: Defect("Arguments that do not fit the stages fail somewhere inside"),
    15: Defect('An unknown type is "Cannot find None in registry"'),
    16: Defect("Checkpointing moves running statistics twice per step"),
    17: Defect(
        "Fusing batch norms goes by the order of registration",
        remains="mmcv's function takes every subclass of `nn.Conv2d` for a plain one, so a net with `ConvWS`, "
        "`ConvAWS` or `SAC`, whose filters are rescaled each time they are used, gives other outputs after it. It "
        "fails on a `ResNetV2` with `final_norm` behind a plain stem.",
    ),
    18: Defect(
        "`torch.fx` and what is built on it fail on ResNeSt and on `with_cp`",
        remains="mmengine's function raises KeyError wherever a batch norm follows a function and not a layer: in "
        "`ResNetV2`, IBN-a and `TridentResNet`, and with `ConvWS`, `ConvAWS` or `SAC`.",
    ),
    19: Defect(
        "Training on a CPU in bfloat16, resuming, and loading checkpoints",
        remains="`AmpOptimWrapper`, `Runner` and `CheckpointLoader` are mmengine's, and stay in use under its runner. "
        "Where weights go through `resbackbone.checkpoints.load_checkpoint`, as they do for `init_cfg`, nothing in a "
        "file runs, and the logs and numpy values in it are no hindrance.",
    ),
    20: Defect(
        "`mmdet::` configs and `mmengine.hub` need `pkg_resources`, gone from setuptools 82 on",
        remains="mmengine's alone; nothing here imports it.",
    ),
    21: Defect(
        "mmcv's compiled operators read feature maps in channels_last as if they were contiguous",
        remains="where no integration is imported, and for operators of CUDA devices that were not tried, a map in "
        "channels_last is still misread. Ours are contiguous unless the images or weights are in channels_last.",
        details=OPERATORS,
    ),
}


def main(
    check: Annotated[bool, typer.Option("--check", help="Write nothing; exit with 1 if the page is out of date.")] = (
        False
    ),
) -> None:
    """Write docs/upstream_defects.md from the tests named test_defect_NN_..."""
    try:
        page = render(list(find_cases(ROOT / "tests")))
    except ValueError as error:
        sys.exit(f"error: {error}")
    if not check:
        PAGE.write_text(page, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page:
        sys.exit(f"{PAGE.relative_to(ROOT)} is out of date; run `python tools/upstream_defects.py`")


def find_cases(folder: Path) -> Iterator[Case]:
    """Yield the tests of numbered defects below a folder, by file and line; those in real hosts last.

    Raises:
        ValueError: If one has a number that ``DEFECTS`` does not know, or no docstring.
    """
    for path in sorted(folder.rglob("test_*.py"), key=lambda path: (len(path.parts), path)):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            found = re.match(r"test_defect_(\d+)_", node.name) if isinstance(node, ast.FunctionDef) else None
            if found is None:
                continue
            assert isinstance(node, ast.FunctionDef)
            where, text = path.relative_to(folder.parent).as_posix(), ast.get_docstring(node)
            if int(found[1]) not in DEFECTS:
                raise ValueError(f"{where}: {node.name} has a number without an entry in DEFECTS, 1 to {len(DEFECTS)}")
            if not text:
                raise ValueError(f"{where}: {node.name} needs a docstring: what is wrong upstream, what is right")
            yield Case(int(found[1]), node.name, where, " ".join(text.split()).replace("``", "`"))


def render(cases: list[Case]) -> str:
    """Return the page.

    Raises:
        ValueError: If a defect has neither a test nor a reason why.
    """
    tested, untested = [], []
    for number, defect in DEFECTS.items():
        lines = [f"- {case.text} [{case.name}](../{case.path})" for case in cases if case.number == number]
        if lines:
            remains = f"\nNot repaired: {defect.remains}\n" if defect.remains else ""
            details = f"\n{defect.details}" if defect.details else ""
            tested.append(f"## {number}. {defect.title}\n\n" + "\n".join(lines) + f"\n{details}{remains}")
        elif defect.remains:
            untested.append(f"### {number}. {defect.title}\n\n{defect.remains}\n")
        else:
            raise ValueError(f"defect {number} has no test, and DEFECTS does not say why (`remains`)")
    rest = ["## Not ours, and without a test\n", *untested] if untested else []
    return "\n".join([INTRODUCTION, *tested, *rest])


if __name__ == "__main__":
    typer.run(main)
