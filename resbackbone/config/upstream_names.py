"""Names of architectures and arguments in other libraries, and suggestions for unknown names."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache
from typing import Any

# timm's names of architectures without published weights; the catalog has the others.
_TIMM = {
    "regnetx_004_tv": "regnetx_400mf_tv",
    "regnety_008_tv": "regnety_800mf_tv",
    "regnety_080_tv": "regnety_8.0gf_tv",
    "seresnext26tn_32x4d": "seresnext26t_32x4d",
}
_ORIGINS = ("timm", "torchvision")
# Prefixes of timm's and torchvision's names: the hub, and who trained the weights.
_HUB = re.compile(r"^(hf[-_]hub:|catalog:|tu-|timm-)")
_TRAINER = re.compile(r"^(gluon|tv|ssl|swsl|ig)_(?=.*res)")
# timm's tag of the weights of an architecture: resnet50.a1_in1k.
_TAG = re.compile(r"^(?:timm/)?([a-z]\w*)\.[a-z]\w*$")
# Names on the Hugging Face hub, and the names in our configs or timm's.
_HUGGING_FACE = (
    (re.compile(r"^microsoft/resnet-(18|26|34|50|101|152)$"), r"resnet\1"),
    (re.compile(r"^facebook/regnet-([xy])-(\d{3,4})(-seer)?(-in1k)?$"), r"regnet\1_\2"),
    (re.compile(r"^torchvision/(\w+)$"), r"\1"),
    (re.compile(r"^timm/(\w+)$"), r"\1"),
)
# RT-DETR's names of detectors, and PaddlePaddle's of these backbones with and without its distilled weights. Its "vd"
# models have a projection in the first stage, too, as ResNet-D with bottlenecks does.
_PADDLE = (
    (re.compile(r"^(?:PekingU/)?rt-?detr(?:[-_]?v[23])?[-_]r(18|34|50|101)vd(?:[-_]\w+)?$", re.I), r"rtdetr_r\1"),
    (re.compile(r"^p?resnet(18|34|50|101)[-_]?vd(?:_ssld)?(?:_v2)?(?:_pretrained)?$", re.I), r"rtdetr_r\1"),
    (re.compile(r"^p?resnet(152|200)[-_]?vd(?:_ssld)?(?:_v2)?(?:_pretrained)?$", re.I), r"resnet\1_v1d"),
)
_NO_CLASSIFIER = "a backbone returns feature maps; ImageClassifier adds a classifier"
_RELU = "the activation is ReLU; a subclass changes it, see docs/add_a_variant.md"
_FROZEN_NORMS = (
    "`norm_eval` keeps batch norms in eval mode; `norm_cfg`=dict(type='FrozenBN') freezes them permanently, and "
    "requires_grad=False in it freezes their weights"
)
_OUT_INDICES = "`out_indices` selects the returned stages, counted from 0"
_DEFORMABLE = "`dcn` is the config of deformable convolutions, and `stage_with_dcn` selects the stages"
_WIDTHS = "widths follow from `depth` and `base_channels`; the attribute out_channels has those of the outputs"
_VARIANTS = "variants are separate classes here, such as ResNetV1c and ResNetV1d"
_PARAM_GROUPS = "the optimizer sets learning rates and decay of layers; see resbackbone.training.param_groups"
_STRIDES = "`strides` and `dilations` have one value per stage, such as strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4)"
_MOST_CLASSES = 4  # an argument of more classes is no useful hint
ARGUMENTS = {
    **dict.fromkeys(("num_classes", "global_pool", "drop_rate", "head_cfg", "num_labels"), _NO_CLASSIFIER),
    "features_only": "every backbone here returns feature maps; `out_indices` selects them",
    **dict.fromkeys(("progress", "exportable", "scriptable", "cache_dir"), "it has no equivalent; remove it"),
    **dict.fromkeys(
        ("weights", "checkpoint_path", "encoder_weights", "pretrained_cfg", "use_pretrained_backbone"),
        "build_backbone(..., checkpoint=...) loads weights: a file, a URL or a name of `resbackbone list --weights`",
    ),
    **dict.fromkeys(
        ("in_chans", "num_channels", "num_input_channels", "input_channels"), "it is called `in_channels` here"
    ),
    **dict.fromkeys(("output_stride", "replace_stride_with_dilation", "res5_dilation", "dilation"), _STRIDES),
    **dict.fromkeys(
        ("norm_layer", "norm", "norm_type", "bn_type", "batch_norm_layer", "sync_bn"),
        "it is `norm_cfg` here, such as dict(type='BN')",
    ),
    **dict.fromkeys(("act_cfg", "act_layer", "act", "activation", "hidden_act", "nonlinearity"), _RELU),
    "width_per_group": "it is `base_width` here, which applies with `groups` above 1; wide nets are WideResNet",
    **dict.fromkeys(
        ("freeze_norm", "norm_freeze", "norm_frozen", "freeze_bn", "bn_frozen", "frozen_bn"), _FROZEN_NORMS
    ),
    **dict.fromkeys(("bn_eval", "freeze_batch_norm", "freeze_batch_norm_2d", "freeze_bn_stats"), _FROZEN_NORMS),
    **dict.fromkeys(("with_dcn", "use_dcn", "dcn_v2_stages", "deform_on_per_stage", "dcn_stages"), _DEFORMABLE),
    **dict.fromkeys(("deform_modulated", "deform_num_groups", "use_deform"), _DEFORMABLE),
    **dict.fromkeys(("num_features", "hidden_sizes", "hidden_size", "widths"), _WIDTHS),
    **dict.fromkeys(("out_channels", "res2_out_channels"), _WIDTHS),
    **dict.fromkeys(("variant", "resnet_variant"), _VARIANTS),
    **dict.fromkeys(("lr_mult_list", "lr_mult", "norm_decay", "layer_decay", "paramwise_cfg"), _PARAM_GROUPS),
    **dict.fromkeys(
        ("encoder_name", "backbone_name", "model_name", "backbone"),
        "the name of an architecture is the first argument of build_backbone; `depth` is the depth",
    ),
    "downsample_in_first_stage": "`strides`=(2, 2, 2, 2) for True: the first one is that of the first stage",
    "replace_stem_pool": "ResNetRS has a convolution instead of the stem's pooling; other stems are separate classes",
    "stem_pool": "the class determines the stem's pooling; ResNetRS has a convolution instead",
    "down_kernel_size": "the class determines the kernel of shortcuts: `avg_down` pools before a 1x1 convolution",
    "block_reduce_first": "the class and `depth` determine the block",
    **dict.fromkeys(
        ("freeze_stages", "freeze_stage", "frozen_layers", "num_frozen_stages"), "it is `frozen_stages` here"
    ),
    **dict.fromkeys(("cardinality", "num_groups"), "it is `groups` here"),
    "stochastic_depth_prob": "it is `drop_path_rate` here",
    "drop_block_rate": "there is no DropBlock; `drop_path_rate` drops whole branches",
    **dict.fromkeys(("zero_init_last", "zero_init_last_bn", "zero_init_gamma"), "it is `zero_init_residual` here"),
    "stem_width": "it is `stem_channels` here, twice as large for a deep stem",
    "stem_type": "it is `deep_stem` here, True or False; other stems are separate classes, such as ResNetT",
    "embedding_size": "it is `stem_channels` here",
    **dict.fromkeys(("layers", "depths", "block_counts"), "it is `stage_blocks` here; `depth` determines the block"),
    **dict.fromkeys(
        ("block", "layer_type", "downsample_in_bottleneck"),
        "`depth` determines the block, and `style` ('pytorch' or 'caffe') where a bottleneck has its stride",
    ),
    "stride_in_1x1": "it is style='caffe' here, and style='pytorch' for False",
    **dict.fromkeys(
        ("out_features", "return_layers", "returned_layers", "return_nodes", "return_idx", "out_idx", "feature_maps"),
        _OUT_INDICES,
    ),
    "freeze_at": "it is `frozen_stages` here, which counts from 0 for the stem: freeze_at - 1",
    "trainable_layers": "it is `frozen_stages` here, of all 4: 4 - trainable_layers",
    "trainable_backbone_layers": "it is `frozen_stages` here, of all 4: 4 - trainable_backbone_layers",
    **dict.fromkeys(("grad_checkpointing", "gradient_checkpointing", "use_checkpoint"), "it is `with_cp` here"),
    **dict.fromkeys(
        ("attn_layer", "block_args"),
        "attention layers are `plugins` here, or classes such as SEResNet and SKResNet",
    ),
    **dict.fromkeys(("aa_layer", "antialias"), "anti-aliased models are a separate class here: ResNetAA"),
    "encoder_depth": "it is `num_stages` here",
    "custom_imports": "configs that are data cannot import modules; use --import, or build_backbone(..., imports=[])",
}


def find_architecture(name: str, configs: Collection[str]) -> tuple[str, Mapping[str, Any]] | None:
    """Find the config of an architecture by its name in timm, torchvision, on the Hugging Face hub or in the catalog.

    Args:
        name: The name, such as "resnet50d", "gluon_resnet50_v1d", "timm/resnet50d.ra2_in1k", "regnet_y_3_2gf" or
            "microsoft/resnet-50".
        configs: The names that :func:`resbackbone.list_backbones` lists.

    Returns:
        One of ``configs`` and additional arguments; None if the name is unknown.
    """
    known = _architectures()
    bare = re.sub(r"_bitm(_in21k)?$", "_bit", _HUB.sub("", name))
    for pattern, replacement in (*_HUGGING_FACE, *_PADDLE):
        bare = pattern.sub(replacement, bare)
    untagged = _TAG.sub(r"\1", bare)
    for candidate in (name, bare, f"timm/{bare}", _TRAINER.sub("", bare), _without_gluon(bare), untagged):
        if candidate in configs:
            return candidate, {}
        if candidate in known:
            return known[candidate]
    return None


def names_weights(name: str) -> bool:
    """Return whether a name accepted by :func:`find_architecture` refers to published weights, too."""
    return "://" in name or _TAG.match(_HUB.sub("", name)) is not None or _in_catalog(_HUB.sub("", name))


def _in_catalog(name: str) -> bool:
    from resbackbone.checkpoints.hub.catalog import all_names

    return name in all_names()


def nearest_architecture(name: str, known: Iterable[str], *, list_all: str) -> str:
    """Return the end of the error message for an unknown architecture: names of the same family and size.

    Args:
        name: The unknown name.
        known: The known names.
        list_all: How to list all names.
    """
    guesses = _guesses(name, {*known, *(alias for alias in _architectures() if "/" not in alias)})
    if len(guesses) == 1:
        return f"; did you mean {guesses[0]!r}? {list_all}"
    if guesses:
        return f"; did you mean one of {', '.join(map(repr, guesses[:6]))}? {list_all}"
    return f"; {list_all}"


def argument_hint(name: str, known: Iterable[str], others: Mapping[str, Collection[str]]) -> str:
    """Return the end of the error message for an unknown argument: the equivalent here, or the nearest name.

    Args:
        name: The unknown argument.
        known: The known arguments.
        others: The arguments of other classes, by class name.
    """
    if name in ARGUMENTS:
        return f"; {ARGUMENTS[name]}"
    names = sorted(known)
    guess = _near_argument(name, names)
    classes = sorted(class_name for class_name, arguments in others.items() if name in arguments)
    if guess is None and 0 < len(classes) <= _MOST_CLASSES:
        return f"; it is an argument of {', '.join(classes)}"
    return f"; {f'did you mean {guess!r}? ' if guess else ''}Known: {', '.join(names)}"


def _near_argument(name: str, names: list[str]) -> str | None:
    """Return the known name with few different letters, or with the given name as its beginning."""
    distances = {other: _edit_distance(name, other) for other in names}
    near = min(names, key=distances.__getitem__, default=None)
    if near is not None:
        letters = min(len(_letters(name)), len(_letters(near)))
        if distances[near] <= (1 if letters < 5 else 2 if letters < 8 else 3):
            return near
    return next((other for other in names if _begins_words(name, other)), None)


def _letters(name: str) -> str:
    return re.sub(r"\W|_", "", name.lower())


def _edit_distance(given: str, known: str) -> int:
    """Return the edit distance (with swaps) between two names, ignoring case and underscores."""
    a, b = _letters(given), _letters(known)
    rows = [list(range(len(b) + 1))]
    for i, letter in enumerate(a, 1):
        row = [i]
        for j, other in enumerate(b, 1):
            row.append(min(row[-1] + 1, rows[-1][j] + 1, rows[-1][j - 1] + (letter != other)))
            if i > 1 and j > 1 and (letter, a[i - 2]) == (b[j - 2], other):
                row[-1] = min(row[-1], rows[-2][j - 2] + 1)
        rows.append(row)
    return rows[-1][-1]


def _begins_words(given: str, known: str) -> bool:
    """Return whether the words of one name begin those of the other, such as "frozen" for `frozen_stages`."""
    words, longer = given.lower().split("_"), known.lower().split("_")
    return (
        len(words) <= len(longer)
        and len(words[0]) >= 4
        and all(b.startswith(a) for a, b in zip(words, longer, strict=False))
    )


def _without_gluon(name: str) -> str:
    """Return timm's current name for an old gluon name: gluon_resnet50_v1s is resnet50s."""
    return re.sub(r"^gluon_(resnet\d+)_v1([bcds])$", lambda match: match[1] + match[2].replace("b", ""), name)


@lru_cache(maxsize=1)
def _architectures() -> dict[str, tuple[str, Mapping[str, Any]]]:
    """Map every name in another library to a config and additional arguments."""
    from resbackbone.checkpoints.hub.catalog import all_names, list_weights

    found: dict[str, tuple[str, Mapping[str, Any]]] = {name: (config, {}) for name, config in _TIMM.items()}
    for weights in list_weights():
        origin, _, rest = weights.name.partition("/")
        if origin in _ORIGINS and not weights.overrides:
            found.setdefault(rest.partition(".")[0], (weights.config, {}))
    return found | {name: (weights.config, weights.overrides) for name, weights in all_names().items()}


def _tokens(name: str) -> tuple[str, ...]:
    """Split a name into numbers and runs of letters, joining adjacent runs."""
    parts = re.findall(r"[a-z]+|\d+", name.lower())
    joined: list[str] = []
    for part in parts:
        if joined and part.isalpha() and joined[-1].isalpha():
            joined[-1] += part
        else:
            joined.append(part)
    return tuple(joined)


def _guesses(name: str, known: Iterable[str]) -> list[str]:
    tokens = {candidate: _tokens(candidate) for candidate in known}
    given = _tokens(name)
    if not any(part.isdigit() for part in given):
        return []
    same = [candidate for candidate, parts in tokens.items() if parts == given]
    longer = [candidate for candidate, parts in tokens.items() if parts[: len(given)] == given]
    families = {parts[0] for parts in tokens.values() if parts}
    mistyped = [
        candidate
        for candidate, parts in tokens.items()
        if len(parts) == len(given) and all(_alike(a, b, families) for a, b in zip(given, parts, strict=True))
    ]
    prefixes = [candidate for candidate, parts in tokens.items() if _begins(given, parts)]
    return sorted(same or longer or prefixes or mistyped)


def _begins(given: tuple[str, ...], parts: tuple[str, ...]) -> bool:
    """Return whether a name is the beginning of another one; its last word may be incomplete."""
    last = len(given) - 1
    return (
        parts[:last] == given[:last]
        and len(parts) > last
        and given[last].isalpha()
        and parts[last].startswith(given[last])
    )


def _alike(given: str, candidate: str, families: set[str]) -> bool:
    """Return whether two parts differ by at most one typo; numbers and names of families must be equal."""
    if given == candidate:
        return True
    if given.isdigit() or candidate.isdigit() or given in families or min(len(given), len(candidate)) < 5:
        return False
    if (given[0], given[-1]) != (candidate[0], candidate[-1]):  # xresnet and regnetv are other models
        return False
    if len(given) == len(candidate):
        different = [index for index, (a, b) in enumerate(zip(given, candidate, strict=True)) if a != b]
        swapped = len(different) == 2 and [given[i] for i in different] == [candidate[i] for i in reversed(different)]
        return len(different) == 1 or (swapped and different[1] == different[0] + 1)
    short, long = sorted((given, candidate), key=len)
    return len(long) - len(short) == 1 and any(long[:i] + long[i + 1 :] == short for i in range(len(long)))
