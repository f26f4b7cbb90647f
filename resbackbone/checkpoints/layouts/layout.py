"""The base class of key layouts: tables of names, and conversions of values."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from resbackbone.checkpoints.layouts.table import PARAMETERS, Table

Tensors = dict[str, Tensor]

# What the backbones of this library call their parameters and buffers.
_NATIVE = re.compile(
    rf"""(
        (conv1 | bn1? | gn1? | in1 | stem\.\d | maxpool\.\d | fc)
      | layer[1-4]\.\d+\.(
            (conv | bn | gn | in)\d | IN | bn\d\.(BN | IN)
          | (downsample | convs | bns)\.\d+
          | conv\d\.(conv | bn\d | fc\d | conv_offset | offset_[sl] | switch | (pre | post)_context)
          | conv\d\.(paths\.\d\.(conv | bn) | attn\.(fc_reduce | bn | fc_select))
          | se_layer\.conv\d\.conv | eca_layer\.conv | cbam\.(channel\.fc\d | spatial\.(conv | bn)) | rfp_conv
        )
    )\.({PARAMETERS} | weight_(diff | gamma | beta))""",
    re.VERBOSE,
)

_BATCH_NORM = re.compile(r"((?:^|\.))bn(?=\d?\.)")
_GROUP_NORM = re.compile(r"((?:^|\.))gn(?=\d?\.)")


def is_native(name: str) -> bool:
    """Whether a parameter or buffer of ours could have that name."""
    return _NATIVE.fullmatch(name) is not None


@dataclass(frozen=True)
class Layout:
    """How a library names the tensors of a ResNet.

    Attributes:
        name: The library, as in ``convert_state_dict(source=...)``.
        tables: What is named otherwise than here; more than one where the same name means two things, as timm's
            ``bn1`` in plain and deep stems. The one that fits best is taken, of equals the first.
        old: Tables of names that are read and not written: older ones, and rarer ones that other tables can say.
        tidy: What is done to the foreign tensors before they are renamed, such as spelling aliases out.
        finish: What is done to the tensors once they have native names.
        prepare: Its inverse, before they get foreign ones.
    """

    name: str
    tables: tuple[Table, ...] = ()
    old: tuple[Table, ...] = ()
    tidy: Callable[[Tensors], Tensors] = dict
    finish: Callable[[Tensors], Tensors] = dict
    prepare: Callable[[Tensors], Tensors] = dict

    def native_names(self, names: Iterable[str]) -> dict[str, str]:
        """Map tidied foreign names to native ones; what no table knows keeps its name."""
        names = list(names)
        tables = (*self.tables, *self.old)
        candidates = [table.to_native(names) for table in tables]
        best = max(candidates, key=lambda found: sum(is_native(found.get(name, name)) for name in names), default={})
        return {name: best.get(name, name) for name in names}

    def to_native(self, tensors: Mapping[str, Tensor]) -> Tensors:
        """Give foreign tensors their native names and values.

        Raises:
            ValueError: If two of them mean the same.
        """
        tidied = self.tidy(dict(tensors))
        renamed = self.native_names(tidied)
        counts = Counter(renamed.values())
        if twice := [name for name, native in renamed.items() if counts[native] > 1]:
            raise ValueError(f"{' and '.join(twice[:2])} both mean {renamed[twice[0]]}, the weights of one tensor")
        native = self.finish({renamed[name]: tensor for name, tensor in tidied.items()})
        if not self.tables or any(name.endswith(".running_mean") for name in native):
            return native
        # Norms without statistics are group norms, which have a name of their own here and nowhere else.
        return {_BATCH_NORM.sub(r"\1gn", name): tensor for name, tensor in native.items()}

    def to_foreign(self, tensors: Mapping[str, Tensor]) -> Tensors:
        """Give native tensors their foreign names and values; what no table knows keeps its name."""
        prepared = self.prepare(dict(tensors))
        renamed: dict[str, str] = {}
        for spelled in ({name: name for name in prepared}, {name: _GROUP_NORM.sub(r"\1bn", name) for name in prepared}):
            for table in self.tables:
                found = table.to_foreign(spelled.values())
                candidate = {name: found[spelling] for name, spelling in spelled.items() if spelling in found}
                renamed = max(renamed, candidate, key=len)
        return {renamed.get(name, name): tensor for name, tensor in prepared.items()}
