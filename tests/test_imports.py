"""The layers of the house: an import points down only, and what is heavy is imported only where it is used."""

import ast
import subprocess
import sys
from collections.abc import Container, Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import deepcluster

ROOT = Path(deepcluster.__file__).parent
# The command lines of 2018 are on the floor of ours, though they live with the other formats of that release.
RELEASE = "interop/release2018"
# Low to high. A name stands for a module or a package; the parts of one layer do not import one another.
LAYERS = (
    {"core"},
    {"data", "models", "clustering"},
    {"run"},
    {"interop"},
    {"training", "evaluation", "visualization", "applied"},
    {"api", "info"},
    {"demo"},
    {"cli", RELEASE},
    {"__init__", "__main__"},
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
MODULES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))


def part(module: Path) -> str:
    """Name of the layer's part that a module belongs to."""
    return RELEASE if module.is_relative_to(RELEASE) else module.parts[0].removesuffix(".py")


def imports(module: Path) -> Iterator[tuple[str, bool]]:
    """Each name that a module imports, with the names taken from it; and whether for its types alone."""
    tree = ast.parse((ROOT / module).read_text(encoding="utf-8"))
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in for_types) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute"
            yield from ((f"{node.module}.{alias.name}", id(node) in for_types) for alias in node.names)


def test_every_part_has_a_layer() -> None:
    assert {part(module) for module in MODULES} <= LEVEL.keys()


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_point_down(module: Path) -> None:
    own = part(module)
    for name, _ in imports(module):
        root, _, rest = name.partition(".")
        if root != "deepcluster" or own == "__init__" or name == "deepcluster.__version__":
            continue
        other = part(Path(rest.replace(".", "/")))
        if other == own:
            continue
        assert other in LEVEL, f"{module} imports {name}, which is in no layer"
        assert LEVEL[other] < LEVEL[own], f"{module} imports {name}"


def test_no_imports_go_in_circles() -> None:
    known = {dotted(module): module for module in MODULES}
    needs = {
        name: {found for imported, _ in imports(module) if (found := nearest(imported, known)) not in (None, name)}
        for name, module in known.items()
        if name != "deepcluster"
    }
    list(TopologicalSorter(needs).static_order())  # Raises CycleError, which names the circle.


def dotted(module: Path) -> str:
    parts = ("deepcluster", *module.with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def nearest(imported: str, known: Container[str]) -> str | None:
    """The module that an import loads: itself, or the one that the name is taken from."""
    for name in (imported, imported.rpartition(".")[0]):
        if name in known and name != "deepcluster":
            return name
    return None


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_distributed_alone_knows_torch_distributed(module: Path) -> None:
    if module.name == "distributed.py":
        return
    assert not [name for name, _ in imports(module) if name.startswith("torch.distributed")]
    tree = ast.parse((ROOT / module).read_text(encoding="utf-8"))
    used = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    assert "torch.distributed" not in used


@pytest.mark.parametrize(
    "code",
    [
        "import deepcluster; dir(deepcluster)",
        "from deepcluster.cli import main; assert main(['--help']) == 0",
        "from deepcluster.cli import main; assert main(['train', '--help']) == 0",
    ],
)
def test_what_is_heavy_waits_for_its_first_use(code: str) -> None:
    heavy = "torch torchvision numpy sklearn scipy pyarrow PIL".split()  # noqa: SIM905
    check = f"{code}; import sys; found = sys.modules.keys() & {heavy!r}; assert not found, found"
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_all_public_names_resolve() -> None:
    for name in deepcluster.__all__:
        assert getattr(deepcluster, name).__name__ == name
    assert set(deepcluster.__all__) <= set(dir(deepcluster))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = deepcluster.nonsense  # type: ignore[attr-defined]


def test_names_for_type_checkers_are_the_public_ones() -> None:
    named = {name.rpartition(".")[2] for name, for_types in imports(Path("__init__.py")) if for_types}
    assert named == set(deepcluster.__all__)
