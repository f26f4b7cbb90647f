"""docs/architecture.md is true: the package imports what its table says, and the functions of its code paths exist."""

import ast
import re
from pathlib import Path

import pytest

import resbackbone

PACKAGE = Path(resbackbone.__file__).parent
PAGE = PACKAGE.parent / "docs" / "architecture.md"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
# [`Class.method`](../resbackbone/file.py)
REFERENCE = re.compile(r"\[`([\w.]+)`\]\(\.\./(resbackbone/[\w/]+\.py)\)")


def section(title):
    """Return the text below a heading of the second level."""
    page = PAGE.read_text(encoding="utf-8")
    return page.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def table_of_rooms():
    """Map each room to the rooms that it imports, in the order of the page."""
    rows = re.findall(r"^\| `(\w+)` \|.*\|([^|]*)\|$", section("Rooms"), re.M)
    return {room: set(re.findall(r"`(\w+)`", imports)) for room, imports in rows}


ROOMS = table_of_rooms()
# Imports that point upwards, as (file, room).
EXCEPTIONS = set(re.findall(r"^- `([\w/]+\.py)` imports `(\w+)`:", section("Deliberate exceptions"), re.M))


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(tree):
    """The rooms that a module, or a part of one, imports, at its top or inside a function, each with the line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute here"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            room = rest.split(".")[0]
            if package != "resbackbone" or not room:
                continue
            if not any((PACKAGE / room).with_suffix(suffix).exists() for suffix in ("", ".py")):
                # A name of the package itself, such as ResNet; of the version nothing needs to be imported.
                defined_in = getattr(getattr(resbackbone, room), "__module__", "resbackbone")
                room = defined_in.partition(".")[2].partition(".")[0]
            if room:
                yield room, node.lineno


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def test_the_table_has_every_room_once_and_no_other():
    listed = re.findall(r"^\| `(\w+)` \|", section("Rooms"), re.M)
    assert sorted(listed) == sorted({room_of(path) for path in MODULES})


def test_a_room_imports_only_rooms_above_it_in_the_table():
    order = list(ROOMS)
    for index, room in enumerate(order):
        assert ROOMS[room] <= set(order[:index]), room


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_are_those_of_the_table(path):
    room = room_of(path)
    for imported, line in imported_rooms(parse(path)):
        allowed = imported in {room, *ROOMS[room]} or (path.relative_to(PACKAGE).as_posix(), imported) in EXCEPTIONS
        assert allowed, f"{path}:{line}: `{room}` imports `{imported}`, which its row in {PAGE.name} does not list"


@pytest.mark.parametrize("room", ROOMS)
def test_every_import_of_the_table_is_made(room):
    made = {imported for path in MODULES if room_of(path) == room for imported, _ in imported_rooms(parse(path))}
    assert ROOMS[room] - made == set(), f"{PAGE.name} lists imports of `{room}` that no module makes"


@pytest.mark.parametrize(("file", "room"), sorted(EXCEPTIONS))
def test_exceptions_are_made_inside_functions_only(file, room):
    tree = parse(PACKAGE / file)
    inside = [line for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) for line in imported_rooms(node)]
    made = [imported for imported in imported_rooms(tree) if imported[0] == room]
    assert made, f"{PAGE.name} lists an exception that {file} does not need"
    assert set(made) <= set(inside)


def test_integrations_are_imported_by_no_room():
    assert not [room for room, imports in ROOMS.items() if "integrations" in imports]
    assert "integrations" not in dict(imported_rooms(parse(PACKAGE / "__init__.py")))


def test_imports_inside_functions_and_of_public_names_are_seen():
    tree = ast.parse(
        "import resbackbone\nimport resbackbone.cli\nimport torch\nfrom resbackbone import ResNet, __version__\n"
        "def f():\n    from resbackbone.backbones.resnet import ResNet\n    from resbackbone import blocks\n"
    )
    assert list(imported_rooms(tree)) == [("cli", 2), ("backbones", 4), ("backbones", 6), ("blocks", 7)]


def defined_names(path):
    """The functions, classes and methods that a file defines."""
    names = set()

    def collect(node, prefix):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                names.add(f"{prefix}{child.name}")
                collect(child, f"{prefix}{child.name}.")

    collect(parse(path), "")
    return names


def code_paths():
    """Map the title of each code path to its steps."""
    titles = re.split(r"^### (.*)$", section("Five code paths"), flags=re.M)[1:]
    steps = (re.split(r"^\d+\. ", text, flags=re.M)[1:] for text in titles[1::2])
    return dict(zip(titles[::2], steps, strict=True))


def test_every_step_of_a_code_path_names_a_function():
    for steps in code_paths().values():
        assert steps
        assert not [step for step in steps if not REFERENCE.search(step)]


@pytest.mark.parametrize(("name", "file"), sorted(set(REFERENCE.findall(PAGE.read_text(encoding="utf-8")))))
def test_every_reference_of_the_page_is_to_the_file_that_defines_it(name, file):
    assert name in defined_names(PACKAGE.parent / file), f"{file} defines no {name}"


def test_there_are_five_code_paths():
    assert len(code_paths()) == 5


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_module_says_what_it_owns(path):
    assert ast.get_docstring(parse(path))
