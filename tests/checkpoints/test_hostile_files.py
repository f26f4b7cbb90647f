"""Files made to run code, exhaust memory or mislead: no code runs, and refused files have an error that says why."""

import copyreg
import gzip
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from weight_files import WRITERS, weights

from resbackbone.checkpoints.conversion import find_backbone
from resbackbone.checkpoints.readers import describe_placeholders, read_file
from resbackbone.checkpoints.readers.pickle_names import NAMES
from resbackbone.checkpoints.tensors import read_tensors


def assert_refused(path, message):
    """Assert one error of the documented type, in one line that begins with the path."""
    with pytest.raises(ValueError, match=message) as caught:
        read_file(path)
    assert caught.type is ValueError
    text = str(caught.value)
    assert text.startswith(repr(str(path)))
    assert "\n" not in text
    assert len(text) < 1000


# Handwritten pickles: each fragment leaves one object on the stack


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def raw(value):
    return b"B" + struct.pack("<I", len(value)) + value


def integer(value):
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def ints(*values):
    return b"(" + b"".join(map(integer, values)) + b"t"


def name(full_name):
    module, _, attribute = full_name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def call(function, *arguments):
    return function + b"(" + b"".join(arguments) + b"tR"


def mapping(**values):
    return b"}(" + b"".join(text(key) + value for key, value in values.items()) + b"u"


def pickled(fragment):
    return b"\x80\x04" + fragment + b"."


def zipped(members, compression=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    return file.getvalue()


def deflated(members):
    return zipped(members, zipfile.ZIP_DEFLATED)


def torch_zip(fragment, storages=(bytes(16),), **members):
    """Return a file as ``torch.save`` writes it, with any pickle and any storages."""
    data = {f"archive/data/{index}": content for index, content in enumerate(storages)}
    return zipped({"archive/data.pkl": pickled(fragment), **data, **members})


def torch_legacy(content=b"}", system=b"}", keys=b"]", storages=b""):
    magic = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."
    return magic + b"".join(map(pickled, (integer(1001), system, content, keys))) + storages


def storage(kind="torch.FloatStorage", key="0", count=4):
    return b"(" + text("storage") + name(kind) + text(key) + text("cpu") + integer(count) + b"tQ"


def tensor(of=None, offset=0, size=(4,), stride=(1,), hooks=b"N", bits=b"N"):
    view = (of or storage(), integer(offset), ints(*size), ints(*stride))
    return call(name("torch._utils._rebuild_tensor_v2"), *view, b"\x89", hooks, bits)


def dtype(code="f4", state=b""):
    return call(name("numpy.dtype"), text(code), b"\x89", b"\x88") + state


F4 = dtype()
NUMBERS = raw(bytes(8))


def array(kind=F4, shape=(2,), data=NUMBERS):
    empty = call(name("numpy.core.multiarray._reconstruct"), name("numpy.ndarray"), ints(0), raw(b"b"))
    return empty + b"(K\x01" + ints(*shape) + kind + b"\x89" + data + b"tb"


# Code to run: Python's own unpickler makes a directory when it reads one of these fragments


class MakesDirectory:
    """A class such as any library may have: creating or restoring an instance has a side effect."""

    def __new__(cls, path=None):
        if path:
            os.mkdir(path)  # noqa: PTH102 - by the means of an attacker
        return super().__new__(cls)

    def __setstate__(self, path):
        os.mkdir(path)  # noqa: PTH102


mkdir = os.mkdir
MINE = f"{__name__}.MakesDirectory"
SYSTEM = os.mkdir.__module__  # posix or nt
# Code, opcode, and a function of that name in the registry.
EXTENSIONS = [(0xE1, b"\x82\xe1", "os"), (0xE1E1, b"\x83\xe1\xe1", SYSTEM), (0xE1E1E1, b"\x84\xe1\xe1\xe1\0", __name__)]


def climb(path):
    """Get from a harmless function to a harmful one by attributes: why ``getattr`` must never be the real one."""
    getattribute = name("builtins.getattr")
    module = call(getattribute, name("_codecs.encode"), text("__self__"))
    loader = call(getattribute, module, text("__loader__"))
    system = call(call(getattribute, loader, text("load_module")), text(SYSTEM))
    return call(call(getattribute, system, text("mkdir")), text(path))


def inside_a_storage(path):
    return call(name("torch.storage._load_from_bytes"), raw(torch_legacy(call(name("os.mkdir"), text(path)))))


PAYLOADS = {
    "GLOBAL, REDUCE": (lambda path: call(name("os.mkdir"), text(path)), "names 'os.mkdir'"),
    "protocol 0": (lambda path: f"cos\nmkdir\np0\n(V{path}\np1\ntp2\nRp3\n".encode(), "names 'os.mkdir'"),
    "STACK_GLOBAL": (lambda path: call(text("os") + text("mkdir") + b"\x93", text(path)), "names 'os.mkdir'"),
    "dotted": (lambda path: call(text("shutil") + text("os.mkdir") + b"\x93", text(path)), "names 'shutil.os.mkdir'"),
    "INST": (lambda path: b"(" + text(path) + b"ios\nmkdir\n", "names 'os.mkdir'"),
    "OBJ": (lambda path: b"(" + name("os.mkdir") + text(path) + b"o", "names 'os.mkdir'"),
    "NEWOBJ": (lambda path: name(MINE) + text(path) + b"\x85\x81", f"names '{MINE}'"),
    "NEWOBJ_EX": (lambda path: name(MINE) + text(path) + b"\x85}\x92", f"names '{MINE}'"),
    "BUILD": (lambda path: name(MINE) + b")\x81" + text(path) + b"b", f"names '{MINE}'"),
    "eval": (lambda path: call(name("builtins.eval"), text(f"__import__('os').mkdir({path!r})")), "builtins.eval"),
    "partial": (lambda path: call(call(name("functools.partial"), name("os.mkdir"), text(path))), "functools.partial"),
    "getattr": (climb, "names 'builtins.getattr'"),
    "in a storage": (inside_a_storage, "names 'torch.storage._load_from_bytes'"),
    **{f"EXT{len(op) - 1}": (lambda path, op=op: call(op, text(path)), "opcode EXT") for _, op, _ in EXTENSIONS},
}

CONTAINERS = {
    "pickle": pickled,
    "torch": torch_zip,
    "torch legacy, object": torch_legacy,
    "torch legacy, system": lambda fragment: torch_legacy(system=fragment),
    "torch legacy, keys": lambda fragment: torch_legacy(keys=fragment),
}

PLACES = {
    "value": lambda fragment: mapping(x=fragment),
    "key": lambda fragment: b"}" + fragment + b"K\x01s",
    "list": lambda fragment: mapping(x=b"](" + fragment + b"e"),
    "tuple": lambda fragment: mapping(x=fragment + b"\x85"),
    "set": lambda fragment: mapping(x=b"\x8f(" + fragment + b"\x90"),
    "OrderedDict": lambda fragment: call(name("collections.OrderedDict"), b"](](" + text("x") + fragment + b"ee"),
    "attributes": lambda fragment: call(name("collections.OrderedDict")) + fragment + b"b",
    "nested": lambda fragment: mapping(meta=mapping(epoch=b"K\x03", x=b"](" + mapping(y=fragment) + b"e")),
    "mmengine's log": lambda fragment: mapping(
        log=name("mmengine.logging.history_buffer.HistoryBuffer") + b")\x81" + mapping(x=fragment) + b"b"
    ),
    "numpy objects": lambda fragment: mapping(x=array(dtype("f4"), data=b"](" + fragment + b"e")),
    "numpy dtype": lambda fragment: mapping(x=array(dtype("f4", fragment + b"b"))),
    "numpy scalar": lambda fragment: mapping(x=call(name("numpy._core.multiarray.scalar"), dtype(), fragment)),
    "hooks": lambda fragment: mapping(x=tensor(hooks=fragment)),
    "tensor's size": lambda fragment: mapping(x=call(name("torch.Size"), fragment)),
    "member of a frozenset": lambda fragment: mapping(x=b"(" + fragment + b"\x91"),
    "set of protocol 2": lambda fragment: mapping(x=call(name("__builtin__.set"), b"](" + fragment + b"e")),
    "tuple as a key": lambda fragment: mapping(x=b"}" + fragment + b"K\x01\x86Ns"),
    "unknown object": lambda fragment: mapping(x=name("argparse.Namespace") + b")\x81" + mapping(y=fragment) + b"b"),
    "unknown list": lambda fragment: mapping(x=name("a.List") + b")\x81(" + fragment + b"e"),
    "unknown mapping": lambda fragment: mapping(x=name("a.Dict") + b")\x81" + text("y") + fragment + b"s"),
    "unknown set": lambda fragment: mapping(x=name("a.Set") + b")\x81(" + fragment + b"\x90"),
    "state dict's versions": lambda fragment: mapping(
        x=call(name("collections.OrderedDict")) + mapping(_metadata=mapping(y=fragment)) + b"b"
    ),
    "counts": lambda fragment: mapping(x=call(name("collections.Counter"), b"}" + fragment + b"K\x01s")),
    "default": lambda fragment: mapping(x=call(name("collections.defaultdict"), fragment)),
    "deque": lambda fragment: mapping(x=call(name("collections.deque"), b"](" + fragment + b"e")),
    "paddle": lambda fragment: mapping(x=call(name("builtins.tuple"), text("w") + fragment + b"\x86")),
    "dropped": lambda fragment: mapping(x=fragment + b"0]q\x07"),
}


@pytest.fixture
def canary(tmp_path):
    return tmp_path / "canary"


@pytest.fixture(autouse=True, scope="module")
def _extensions():
    """A program that has registered extensions: Python's unpickler then does not look up the function's name."""
    for code, _, module in EXTENSIONS:
        copyreg.add_extension(module, "mkdir", code)
    yield
    for code, _, module in EXTENSIONS:
        copyreg.remove_extension(module, "mkdir", code)


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.filterwarnings("ignore")  # Python's loaders are deprecated
def test_the_payloads_run_where_nothing_stops_them(payload, canary):
    pickle.loads(pickled(PAYLOADS[payload][0](str(canary))))
    assert canary.is_dir()


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("payload", PAYLOADS)
def test_no_payload_runs_in_any_container(payload, container, canary, tmp_path):
    fragment, message = PAYLOADS[payload]
    (tmp_path / "hostile").write_bytes(CONTAINERS[container](fragment(str(canary))))
    if container == "torch legacy, system" and "opcode" not in message:  # which nobody looks at
        assert read_file(tmp_path / "hostile") == {}
    elif container == "torch legacy, keys" and "opcode" not in message:
        assert_refused(tmp_path / "hostile", "lists storages without names")
    else:
        assert_refused(tmp_path / "hostile", message)
    assert not canary.exists()


@pytest.mark.parametrize("payload", [payload for payload in PAYLOADS if "EXT" not in payload])
@pytest.mark.parametrize("place", PLACES)
def test_no_payload_runs_in_any_place(place, payload, canary, tmp_path):
    """It is not loaded, or the file is refused where only numbers can be."""
    fragment, message = PAYLOADS[payload]
    for container in ("pickle", "torch", "torch legacy, object"):
        (tmp_path / "hostile").write_bytes(CONTAINERS[container](PLACES[place](fragment(str(canary)))))
        content = read_or_refuse(tmp_path / "hostile")
        assert not canary.exists()
        only_numbers = place in ("numpy objects", "numpy dtype", "numpy scalar", "tensor's size")
        assert (content is None) == (only_numbers or (place == "hooks" and container != "torch"))
        if place in ("value", "key", "list", "tuple", "set", "OrderedDict", "nested", "counts", "deque"):
            name = message.removeprefix("names ").strip("'")
            assert [note for note in describe_placeholders(content) if note.startswith(f"{name} at ")]


@pytest.mark.parametrize("payload", [payload for payload in PAYLOADS if "EXT" in payload])
def test_extensions_are_refused_in_any_place(payload, canary, tmp_path):
    """Python's unpickler reads them from the registry without calling ``find_class``."""
    for place in PLACES.values():
        (tmp_path / "hostile").write_bytes(pickled(place(PAYLOADS[payload][0](str(canary)))))
        assert_refused(tmp_path / "hostile", "opcode EXT")
    assert not canary.exists()


def test_no_payload_runs_in_npz(canary, tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(canary),)

    np.savez(tmp_path / "a.npz", x=np.array([Payload()], dtype=object))
    assert_refused(tmp_path / "a.npz", "holds 'x.npy' of type object; only arrays of numbers are read")
    assert not canary.exists()
    with np.load(tmp_path / "a.npz", allow_pickle=True) as content:
        assert content["x"] == [None]
    assert canary.is_dir()


class Restricted(pickle.Unpickler):
    """Python's unpickler in C, with all restrictions that it permits."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError("refused")


def test_the_unpickler_in_c_reads_functions_from_the_registry():
    """The reason why `SafeUnpickler` is not a subclass of it; if this fails, it could be."""
    for code, opcode, _ in EXTENSIONS:
        vars(copyreg)["_extension_cache"][code] = os.mkdir  # as it is once one was used
        try:
            assert Restricted(io.BytesIO(pickled(opcode))).load() is os.mkdir
        finally:
            del vars(copyreg)["_extension_cache"][code]


def test_the_unpickler_in_c_crashes_at_a_deep_key():
    """The other reason: it hashes keys of the file, and that cannot be replaced."""
    code = """if True:
        import io, pickle
        pickle.Unpickler(io.BytesIO(b"\\x80\\x04})" + b"\\x85" * 2_000_000 + b"K\\x01s.")).load()
    """
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode < 0


def test_allowlists_of_other_libraries_are_not_used(tmp_path):
    """If a library registers the real ``getattr`` with PyTorch, as mmengine does, ``weights_only`` loads call it."""
    globals_of_torch = call(name("__builtin__.getattr"), name("torch._utils._rebuild_tensor"), text("__globals__"))
    (tmp_path / "hostile").write_bytes(b"\x80\x02" + mapping(x=globals_of_torch) + b".")
    with torch.serialization.safe_globals([getattr]):
        assert describe_placeholders(read_file(tmp_path / "hostile")) == ("builtins.getattr at 'x'",)


@pytest.mark.parametrize("attribute", ["__defaults__", "__code__", "__dict__", "__class__", "call", "name", "content"])
def test_replacements_of_names_cannot_be_changed(attribute, tmp_path):
    state = mapping(**{attribute: b"K\x01\x85"})
    for target in NAMES:
        for stated in (state, b"N" + state + b"\x86"):  # attributes, and slots
            (tmp_path / "hostile").write_bytes(pickled(mapping(x=name(target) + stated + b"b")))
            assert_refused(tmp_path / "hostile", "sets attributes of a (SafeFunction|dtype)")


def test_an_unknown_name_is_new_each_time(tmp_path):
    for state in (mapping(y=b"K\x01"), mapping()):
        (tmp_path / "hostile").write_bytes(pickled(mapping(x=name("a.B") + state + b"b")))
        content = read_file(tmp_path / "hostile")
        assert repr(content["x"]) == "<a.B, not loaded>"
        assert content["x"].content == []


# Other damaged and hostile files


def npy(shape="(4,)", descr="'<f4'", data=bytes(16)):
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


def safetensors(header, data=bytes(16), length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(start=0, end=16, shape=(4,), kind="F32"):
    return {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}


def laughs():
    """Tuples of ten times the tuple before: ten to the power of 40 objects in a kilobyte."""
    fragment = b"]q\0"
    for index in range(40):
        fragment = b"(" + fragment + 9 * (b"h" + bytes([index])) + b"tq" + bytes([index + 1])
    return fragment


def laughs_as_keys():
    """The same with tuples only, which are hashable."""
    return laughs().replace(b"]q", b")q", 1)


def large_integer(value):
    return b"\x8a\x20" + value.to_bytes(32, "little", signed=True)


def colliding(count, wrap=lambda key: key):
    """Keys of one hash: numbers that are the same modulo 2**61 - 1, which Python calculates with."""
    return [wrap(large_integer(7 + index * (2**61 - 1))) for index in range(count)]


def copied(large, function, *more):
    """Pass one large object to a function a thousand times."""
    arguments = b"(h\0" + b"".join(more) + b"t"
    return b"](" + large + b"q\0" + 1000 * (name(function) + arguments + b"R") + b"e"


def patched(content, after, offset, value):
    """Overwrite a field of the last record with this start."""
    start = content.rindex(after) + offset
    return content[:start] + value + content[start + len(value) :]


def declared_larger(content):
    """Give the last member a size of three gigabytes in the directory of a zip file."""
    return patched(content, b"PK\1\2", 20, struct.pack("<II", 3 << 30, 3 << 30))


def tar():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("storages"), io.BytesIO())
    return file.getvalue()


def legacy_tensor(count):
    """A legacy file that declares `count` numbers in its one storage."""
    return torch_legacy(
        mapping(x=tensor()), keys=b"](" + text("0") + b"e", storages=struct.pack("<q", count) + bytes(16)
    )


BIG = 1 << 40
X = mapping(x=b"K\x01")
PAIRS = b"](" + b"".join(b"](" + text(str(index)) + b"K\x01e" for index in range(20_000)) + b"e"
MANY = array(shape=(20_000,), data=b"h\0")
FIELDS = b"(K\x03" + text("<") + b"N" + text("a") + b"\x85}tb"
# The fault, the file's bytes, and the error text.
HOSTILE = [
    # Not checkpoints
    ("empty", b"", "is empty; download or copy it again"),
    ("web page", b"<!DOCTYPE html>\n<html><title>404</title></html>", "is a web page, perhaps the error page"),
    ("web page after a blank line", b"\r\n <HTML>403</HTML>", "is a web page, perhaps the error page"),
    ("error of a bucket", b'<?xml version="1.0"?><Error>AccessDenied</Error>', "is a web page, perhaps the error page"),
    ("Git LFS", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS .* run `git lfs pull`"),
    ("text", b"Not found, try again later.", "is text and no checkpoint; it begins with b'Not found"),
    ("JSON", b'{"error": "rate limit"}', "is JSON without a `weight_map`"),
    ("deep JSON", b'{"weight_map": ' + b"[" * 200_000, "is damaged, download or copy it again"),
    ("gzip", gzip.compress(bytes(1000)), r"begins with b'\\x1f\\x8b.*', which no kind of checkpoint does that is read"),
    ("HDF5", b"\x89HDF\r\n\x1a\n" + bytes(100), r"begins with b'\\x89HDF"),
    ("tar", tar(), "is a tar file, as PyTorch wrote before 2017; load it there and save it again"),
    ("a list", pickled(b"]"), "holds no mapping of names to tensors but a list"),
    ("a number", torch_zip(b"K\x01"), "holds no mapping of names to tensors but a int"),
    ("a model", torch_zip(name("torchvision.models.ResNet") + b")\x81"), "names 'torchvision.models.ResNet', which is"),
    # Zip files
    ("TorchScript", torch_zip(X, **{"archive/constants.pkl": b""}), "is a TorchScript archive, which holds code"),
    ("other zip", zipped({"readme.txt": b"hello"}), "is a zip file of neither PyTorch nor numpy, of readme.txt"),
    ("empty zip", zipped({}), "is a zip file of neither PyTorch nor numpy, of no members"),
    ("zip in zip", zipped({"a.zip": torch_zip(X)}), "is a zip file of neither PyTorch nor numpy, of a.zip"),
    ("bomb of torch", deflated({"archive/data.pkl": bytes(30 << 20)}), "has compressed members, .* nothing was unp"),
    ("bomb of numpy", deflated({"x.npy": bytes(30 << 20)}), "would grow from 30,.* to 31,457,280 bytes; nothing was"),
    ("false size, torch", declared_larger(torch_zip(X)), "declares members of more bytes than the file has"),
    ("false size, numpy", declared_larger(zipped({"x.npy": npy()})), "would grow from .* to 3,221,225,472 bytes"),
    ("twice a name", torch_zip(X, **{"archive/DATA.pkl": b""}), "is a zip file with two members of one name"),
    ("member elsewhere", patched(torch_zip(mapping(x=tensor())), b"PK\3\4", 0, b"none"), "damaged at 'archive/data/0'"),
    ("member too far", patched(torch_zip(mapping(x=tensor())), b"PK\3\4", 28, b"\xff\xff"), "is cut off in the middle"),
    ("cut zip", torch_zip(X)[:-30], "is a zip file that is cut off or damaged; download or copy it again"),
    ("byte order", torch_zip(X, **{"archive/byteorder": b"mixed"}), "was written in the byte order 'mixed'"),
    ("npz, false shape", zipped({"x.npy": npy(f"({BIG},)")}), "declares 'x.npy' of shape .*, which is not its size"),
    ("npz, fields", zipped({"x.npy": npy(descr="[('a', '<f4')]")}), "only arrays of numbers are read"),
    ("npz, code", zipped({"x.npy": npy("__import__('os')")}), "is damaged, download or copy it again"),
    # Expensive pickles
    ("laughs", pickled(laughs()), "holds more than 1,000,000 objects; a checkpoint holds far fewer"),
    ("laughs of torch", torch_zip(laughs()), "holds more than 1,000,000 objects; a checkpoint holds far fewer"),
    ("laughing name", pickled(laughs() + text("x") + b"\x93"), "is damaged, download or copy it again"),
    ("laughing codec", pickled(call(name("_codecs.encode"), text("x"), laughs())), "that are not written as latin1"),
    ("laughing type", pickled(call(name("numpy.dtype"), laughs())), "names 'numpy.dtype', which is neither"),
    ("laughing device", pickled(call(name("torch.device"), laughs(), b"K\x01")), "holds a device without a name"),
    ("laughing size", torch_zip(call(name("torch._utils._rebuild_tensor"), storage(), laughs(), b"]", b"]")), "imposs"),
    ("laughing key", torch_legacy(keys=b"]" + laughs() + b"a"), "lists storages without names"),
    ("deep lists", pickled(b"]" * 50_000 + b"a" * 49_999), "is nested more than 100 deep"),
    ("deep tuples", pickled(b")" + b"\x85" * 500_000), "is nested more than 100 deep"),
    ("deep key", pickled(b"})" + b"\x85" * 500_000 + b"K\x01s"), "with a long tuple as a key"),
    ("deep member", pickled(b"\x8f()" + b"\x85" * 500_000 + b"\x90"), "with a long tuple as a key"),
    ("laughing member", pickled(b"(" + laughs_as_keys() + b"\x91"), "with a long tuple as a key"),
    ("many steps", pickled(b"(" * 1_100_000), "holds a pickle of more than 1,000,000 steps"),
    ("copied pairs", pickled(copied(PAIRS, "collections.OrderedDict")), "copies its content over and over"),
    ("copied text", pickled(copied(text("x" * 9999), "_codecs.encode", text("latin1"))), "copies its content over"),
    ("copied array", pickled(b"](" + raw(bytes(80_000)) + b"q\0" + 900 * MANY + b"e"), "copies its content over"),
    ("colliding keys", pickled(b"}(" + b"".join(key + b"N" for key in colliding(30_000)) + b"u"), "chosen to collide"),
    (
        "colliding keys, one by one",
        pickled(b"}" + b"".join(key + b"Ns" for key in colliding(30_000))),
        "chosen to collide",
    ),
    (
        "colliding tuples",
        pickled(b"}(" + b"".join(key + b"N" for key in colliding(30_000, lambda key: key + b"\x85")) + b"u"),
        "chosen to collide",
    ),
    ("colliding members", pickled(b"\x8f(" + b"".join(colliding(30_000)) + b"\x90"), "chosen to collide"),
    (
        "colliding members, protocol 2",
        pickled(call(name("__builtin__.set"), b"](" + b"".join(colliding(30_000)) + b"e")),
        "chosen to collide",
    ),
    ("long number", pickled(b"L" + b"9" * 1_000_000 + b"L\n"), "holds a number of too many digits"),
    ("false length", pickled(b"\x8e" + struct.pack("<Q", BIG)), "is cut off in the middle; download or copy it again"),
    ("false length, text", pickled(b"\x8d" + b"\xff" * 7 + b"\0"), "is cut off in the middle; download or copy it"),
    ("bytes by number", torch_zip(call(name("__builtin__.bytearray"), integer(BIG))), "names 'builtins.bytearray'"),
    ("tensor by number", torch_zip(call(name("torch.FloatTensor"), integer(BIG))), "names 'torch.FloatTensor'"),
    # Damaged pickles
    ("nothing on the stack", pickled(b"s"), "is damaged, download or copy it again"),
    ("nothing remembered", pickled(b"h\7"), "is damaged, download or copy it again"),
    ("no text", pickled(b"X\1\0\0\0\xff"), "is damaged, download or copy it again"),
    ("no opcode", pickled(b"\xff"), r"holds the pickle opcode b'\\xff', which checkpoints do not need"),
    ("items of a list", pickled(b"]" + text("x") + b"Ns"), "puts what belongs into a dict into a list"),
    ("append to a mapping", pickled(b"}Na"), "puts what belongs into a list into a dict"),
    ("list of arguments", pickled(name("collections.OrderedDict") + b"]R"), "calls with a list for arguments"),
    ("too many arguments", pickled(call(name("torch.Size"), b"N", b"N")), "is damaged, download or copy it again"),
    ("number for a tensor's name", pickled(b"}K\x01" + array() + b"s"), "has the key 1 where a name should be"),
    ("the same inside", pickled(mapping(x=b"}K\x01" + array() + b"s")), "has the key 1 where a name should be"),
    # Arrays
    ("fields", pickled(mapping(x=array(dtype("f4", FIELDS)))), "holds an array with fields; only arrays of numbers"),
    ("false shape", pickled(mapping(x=array(shape=(3,)))), r"an array of shape \(3,\) and type float32 in 8 bytes"),
    ("absurd shape", pickled(mapping(x=array(shape=(BIG, BIG)))), "holds an array of shape .* in 8 bytes"),
    ("negative shape", pickled(mapping(x=array(shape=(-1, -2)))), "holds an array of an impossible size"),
    ("numbers in a list", pickled(mapping(x=array(data=b"]"))), "holds an array whose numbers are a list"),
    # Tensors
    ("strides of zero", torch_zip(mapping(x=tensor(size=(BIG,), stride=(0,)))), "over a storage of 4 elements"),
    ("too large", torch_zip(mapping(x=tensor(size=(5,)))), r"of shape \(5,\) and stride \(1,\) over a storage of 4"),
    ("too large a stride", torch_zip(mapping(x=tensor(size=(2,), stride=(4,)))), "over a storage of 4 elements"),
    ("too far", torch_zip(mapping(x=tensor(offset=1))), "over a storage of 4 elements"),
    ("overflow", torch_zip(mapping(x=tensor(size=(1 << 62, 4), stride=(1, 1)))), "over a storage of 4 elements"),
    ("negative offset", torch_zip(mapping(x=tensor(offset=-1))), "holds a tensor of an impossible size"),
    ("negative size", torch_zip(mapping(x=tensor(size=(-4,)))), "holds a tensor of an impossible size"),
    ("negative stride", torch_zip(mapping(x=tensor(stride=(-1,)))), "holds a tensor of an impossible size"),
    ("beyond 64 bits", torch_zip(mapping(x=tensor(size=(1 << 64,)))), "holds a tensor of an impossible size"),
    ("dimensions", torch_zip(mapping(x=tensor(size=[1] * 99, stride=[1] * 99))), "a tensor of an impossible size"),
    ("sizes without strides", torch_zip(mapping(x=tensor(stride=()))), "is damaged, download or copy it again"),
    ("conjugated", torch_zip(mapping(x=tensor(bits=mapping(conj=b"\x88")))), "holds a tensor that is conjugated"),
    ("no storage", torch_zip(mapping(x=tensor(of=b"]"))), "holds a tensor without a storage of numbers"),
    ("false storage", torch_zip(mapping(x=tensor(storage(count=BIG), size=(BIG,)))), "declares more numbers in"),
    ("negative storage", torch_zip(mapping(x=tensor(storage(count=-1)))), "holds a storage of an impossible size"),
    ("lost storage", torch_zip(mapping(x=tensor(storage(key="7")))), "lacks the storage '7'; download or copy"),
    ("storage of a pickle", pickled(mapping(x=tensor())), "refers to tensors outside of itself; save them with"),
    ("no reference", torch_zip(text("x") + b"Q"), "refers to something outside that is no storage of numbers"),
    ("legacy, false storage", torch_legacy(X, keys=b"](" + text("0") + b"e", storages=bytes(8)), "is damaged"),
    ("legacy, cut storage", legacy_tensor(count=BIG), "is cut off in the middle; download or copy it again"),
    ("legacy, negative storage", legacy_tensor(count=-2), "is cut off in the middle; download or copy it again"),
    ("legacy, lost storage", torch_legacy(mapping(x=tensor())), "lacks the storage '0'; download or copy it again"),
    # Safetensors
    *(
        (f"safetensors, {problem}", content, "is a damaged .safetensors file; download or copy it again")
        for problem, content in {
            "overlap": safetensors({"a": entry(), "b": entry(8, 24)}, bytes(24)),
            "hole": safetensors({"a": entry(), "b": entry(24, 40)}, bytes(40)),
            "out of range": safetensors({"a": entry(16, 32)}),
            "backwards": safetensors({"a": entry(16, 0)}),
            "too few numbers": safetensors({"a": entry(shape=(5,))}),
            "overflow": safetensors({"a": entry(shape=(BIG, BIG))}),
            "negative": safetensors({"a": entry(shape=(-4,))}),
            "unknown type": safetensors({"a": entry(kind="OBJECT")}),
            "no JSON": safetensors(b"{" * 64),
            "deep": safetensors(b'{"a":' + b"[" * 100_000),
            "long header": safetensors({"a": entry()}, length=10_000),
            "endless header": safetensors({"a": entry()}, length=2**64 - 1),
            "short header": safetensors({"a": entry()}, length=9),
            "rest": safetensors({"a": entry()}, bytes(17)),
        }.items()
    ),
]  # fmt: skip


@pytest.mark.parametrize(("content", "message"), [case[1:] for case in HOSTILE], ids=[case[0] for case in HOSTILE])
def test_hostile_and_broken_files_get_one_clear_error(content, message, tmp_path):
    (tmp_path / "hostile").write_bytes(content)
    assert_refused(tmp_path / "hostile", message)


@pytest.mark.parametrize("problem", ["bomb", "false", "copied", "absurd", "strides", "legacy", "safetensors"])
def test_declared_sizes_are_not_allocated(problem, tmp_path):
    for case, content, message in HOSTILE:
        if not case.startswith(problem):
            continue
        (tmp_path / "hostile").write_bytes(content)
        tracemalloc.start()
        try:
            assert_refused(tmp_path / "hostile", message)
            assert tracemalloc.get_traced_memory()[1] < 64 << 20
        finally:
            tracemalloc.stop()


def test_a_far_place_in_the_memo_costs_nothing(tmp_path):
    """Python's own unpickler allocates 64 GB for it."""
    (tmp_path / "hostile").write_bytes(pickled(mapping(x=b"Nr\xff\xff\xff\xff")))
    assert read_file(tmp_path / "hostile") == {"x": None}


@pytest.mark.parametrize(
    ("make", "refused"),
    [
        (lambda: torch.eye(3).to_sparse(), "torch._utils._rebuild_sparse_tensor"),
        (lambda: torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8), "torch.QInt8Storage"),
        (lambda: torch.nn.Conv2d(1, 1, 1), "torch.nn.modules.conv.Conv2d"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # some of them are deprecated
def test_tensors_outside_a_known_structure_are_refused(make, refused, tmp_path):
    torch.save({"x": make(), "y": torch.ones(1)}, tmp_path / "a.pth")
    assert_refused(tmp_path / "a.pth", f"holds tensors (inside an object of|of the unknown type) '{refused}'")
    with pytest.raises(ValueError, match=r"nothing was run\. If you trust its author, load it in the program"):
        read_file(tmp_path / "a.pth")


@pytest.mark.parametrize("cut", [0.3, 0.7, 0.99])
@pytest.mark.parametrize("kind", [kind for kind in WRITERS if "sharded" not in kind])
def test_cut_files_are_refused(kind, cut, tmp_path):
    WRITERS[kind](weights(), tmp_path / "weights")
    content = (tmp_path / "weights").read_bytes()
    (tmp_path / "weights").write_bytes(content[: int(cut * len(content))])
    assert_refused(tmp_path / "weights", "download or copy it again")


def test_directories_and_devices_are_refused(tmp_path):
    assert_refused(tmp_path, "is a directory without model.safetensors, .*; give the path of a file in it")
    os.mkfifo(tmp_path / "pipe")
    assert_refused(tmp_path / "pipe", "is no regular file; give the path of one")


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (
            {"x": "../secret.safetensors"},
            "lists the shard '../secret.safetensors'; a shard is a .safetensors or .bin file beside",
        ),
        ({"x": "/etc/secret.safetensors"}, "a shard is a .safetensors or .bin file beside it"),
        ({"x": "..\\secret.safetensors"}, "a shard is a .safetensors or .bin file beside it"),
        ({"x": "model.safetensors.index.json"}, "a shard is a .safetensors or .bin file beside it"),
        ({"x": 1}, "lists the shard 1; a shard is a .safetensors or .bin file beside it"),
        ({"x": ["good.safetensors"]}, "is damaged"),
        ({"x": "lost.safetensors"}, "lists the shard 'lost.safetensors', which is not beside it; download that too"),
        ({"x": "bad.safetensors"}, "lists the shard 'bad.safetensors', which begins with"),
        ({"y": "good.safetensors"}, "lists 'y', which its shard does not hold"),
        (
            {"x": "good.safetensors", "y": "same.safetensors"},
            "'same.safetensors', which holds a tensor of another shard",
        ),
        (["good.safetensors"], "is JSON without a `weight_map`"),
    ],
)
def test_an_index_reads_only_whole_shards_beside_it(weight_map, message, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for path in (tmp_path / "secret", folder / "good", folder / "same"):
        save_file({"x": torch.ones(1)}, path.with_suffix(".safetensors"))
    (folder / "bad.safetensors").write_bytes(bytes(100))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_refused(folder / "model.safetensors.index.json", message)


# Random damage


def read_or_refuse(path):
    try:
        content = read_file(path)
    except ValueError as caught:
        error = caught
    else:
        assert isinstance(content, dict)
        return content
    assert type(error) is ValueError
    assert str(error).startswith(repr(str(path)))
    return None


fuzzed = settings(deadline=None, max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("kind", [kind for kind in WRITERS if "sharded" not in kind])
@fuzzed
@given(data=st.data())
def test_damaged_files_read_or_are_refused(kind, data, tmp_path):
    path = tmp_path / "weights"
    WRITERS[kind](weights(), path)
    content = bytearray(path.read_bytes())
    for place, value in data.draw(
        st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), max_size=9)
    ):
        content[place] = value
    path.write_bytes(content[: data.draw(st.integers(0, 2 * len(content)))])
    read_or_refuse(path)


OPCODES = [bytes([code]) for code in range(256)]
FRAGMENTS = [
    array(),
    tensor(),
    dtype(),
    storage(),
    X,
    text("x"),
    raw(b"12345678"),
    integer(3),
    ints(2, 2),
    b"]",
    b"}",
    b"(",
]
FRAGMENTS += [call(name("collections.OrderedDict")), name("numpy.core.multiarray.scalar"), name("_codecs.encode")]
FRAGMENTS += [name("os.mkdir"), name("argparse.Namespace") + b")\x81", b"\x8f", name("builtins.set"), b"\x93", b"b"]


@fuzzed
@given(parts=st.lists(st.sampled_from(FRAGMENTS) | st.sampled_from(OPCODES), max_size=20))
def test_random_programs_of_the_unpickler_read_or_are_refused(parts, tmp_path):
    for container in (pickled, torch_zip, torch_legacy):
        (tmp_path / "hostile").write_bytes(container(b"".join(parts)))
        read_or_refuse(tmp_path / "hostile")


# Small files with a long part that is repeated


def memoized(*fragments):
    """Return pickle code that keeps fragments, and how each is repeated."""
    kept = b"".join(fragment + b"q" + bytes([number]) + b"0" for number, fragment in enumerate(fragments))
    return kept, *(b"h" + bytes([number]) for number in range(len(fragments)))


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        ("_codecs.encode", text("a" * 100_000) + text("latin1") + b"\x86"),
        ("collections.deque", b"](" + b"N" * 100_000 + b"e\x85"),
        ("builtins.tuple", b"](" + b"N" * 100_000 + b"e\x85"),
        ("torch._tensor._rebuild_from_type_v2", b"(NN)Nt"),
        ("torch._utils._rebuild_tensor_v2", b"(" + b"N" * 100_000 + b"t"),
    ],
)
def test_calls_inside_of_a_call_copy_nothing(function, arguments, tmp_path):
    kept, rebuild, inner = memoized(
        name("torch._tensor._rebuild_from_type_v2"), b"(" + name(function) + b"N" + arguments + b"Nt"
    )
    (tmp_path / "a.pth").write_bytes(torch_zip(kept + mapping(x=b"](" + (rebuild + inner + b"R") * 5000 + b"e")))
    tracemalloc.start()
    try:
        read_or_refuse(tmp_path / "a.pth")
        assert tracemalloc.get_traced_memory()[1] < 60_000_000
    finally:
        tracemalloc.stop()


def test_a_long_key_of_many_mappings_makes_no_long_names(tmp_path):
    kept, key, leaf = memoized(text("k" * 60_000), tensor())
    leaves = b"}(" + b"".join(text(str(index)) + leaf for index in range(2000)) + b"u"
    (tmp_path / "a.pth").write_bytes(torch_zip(kept + (b"}" + key) * 90 + leaves + b"s" * 90))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="has a tensor with a name of 5,400,092 characters") as caught:
            read_tensors(tmp_path / "a.pth")
        assert len(str(caught.value)) < 500
        assert tracemalloc.get_traced_memory()[1] < 60_000_000
    finally:
        tracemalloc.stop()


def test_long_keys_of_plain_objects_are_shortened_in_notes(tmp_path):
    kept, key = memoized(text("k" * 60_000))
    (tmp_path / "a.pth").write_bytes(torch_zip(kept + (b"}" + key) * 90 + name("a.B") + b"s" * 90))
    (note,) = describe_placeholders(read_file(tmp_path / "a.pth"))
    assert note.startswith("a.B at 'kkk")
    assert len(note) < 100


def test_errors_show_only_the_beginning_of_names(tmp_path):
    tensors = {f"{'n' * 900}.{number}": torch.ones(1) for number in range(50)}
    for prefix in (None, "backbone."):
        with pytest.raises(ValueError, match="no known backbone is") as caught:
            find_backbone(tensors, prefix=prefix)
        assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("size", [1, 2**62, 10**5000], ids=["ones", "large", "huge"])
def test_safetensors_of_many_dimensions_are_refused_before_their_product(size, tmp_path):
    shape = [2**62] * 100_000 if size == 2**62 else [1] * 100_000 if size == 1 else [1]
    header = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}})
    header = header if size != 10**5000 else header.replace("[1]", f"[1{'0' * 5000}]")
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(4))
    assert_refused(tmp_path / "a.safetensors", "in the header: (a tensor of 100,000 dimensions|Exceeds the limit)")


def test_more_backbones_than_a_checkpoint_has_are_refused():
    tensors = dict.fromkeys((f"p{number}.layer1.0.conv1.weight" for number in range(8000)), torch.ones(1))
    with pytest.raises(ValueError, match="8,000 backbones are among the keys, with prefixes 'p0"):
        find_backbone(tensors)


def test_long_names_of_classes_are_refused(tmp_path):
    kept, long = memoized(text("m" * 1_000_000))
    (tmp_path / "a.pth").write_bytes(torch_zip(kept + mapping(x=b"](" + (long + long + b"\x93") * 20_000 + b"e")))
    assert_refused(tmp_path / "a.pth", "names a class in 2,000,000 characters; at most 2,000 are read")


def test_a_long_tuple_as_the_key_of_many_mappings_is_refused(tmp_path):
    kept, key = memoized(b"(" + b"K\x01" * 200 + b"t")
    (tmp_path / "a.pth").write_bytes(torch_zip(kept + mapping(x=b"](" + (b"}" + key + b"Ns") * 20_000 + b"e")))
    assert_refused(tmp_path / "a.pth", "long tuples as keys, over and over")
