"""`hubconf.py` at the root of the repository, opened by torch.hub in processes that have no deepcluster on their path."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "hubconf.py").is_file(), reason="hubconf.py is only in the repository")
# Names of packages that are imported under another one.
IMPORTED_AS = {"pillow": "PIL", "scikit-learn": "sklearn"}


def in_process(code: str, cwd: Path, **environment: str) -> Any:
    """What a process prints as JSON. Its folder is not the repository, and its path lacks it."""
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", f"import json, torch\n{code}"],
        cwd=cwd,
        env={**variables, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_run_and_its_features(trained: Path, tmp_path: Path) -> None:
    code = f"""
trunk = torch.hub.load({str(ROOT)!r}, "alexnet_from", {str(trained)!r}, source="local")
features = trunk(torch.ones(2, 3, 16, 16))
import deepcluster
same = torch.equal(features, deepcluster.load({str(trained)!r}).trunk(torch.ones(2, 3, 16, 16)))
try:
    torch.hub.load({str(ROOT)!r}, "vgg16_from", path_or_model={str(trained)!r}, source="local")
except deepcluster.InputError as fault:
    message = str(fault)
print(json.dumps([list(features.shape), trunk.training, same, message, deepcluster.__file__]))
"""
    shape, training, same, message, file = in_process(code, tmp_path)
    assert shape == [2, 256] and not training and same
    assert re.fullmatch(r".* is a model of alexnet-small, not vgg16: use trunk_from, which takes any network", message)
    assert Path(file).is_relative_to(ROOT / "src")


def test_torch_hub_lists_the_entry_points_and_their_help(tmp_path: Path) -> None:
    """`torch.hub.list` takes no local folder, but what it has fetched before is not fetched again."""
    fetched = tmp_path / "hub" / "owner_name_main"
    fetched.parent.mkdir()
    fetched.symlink_to(ROOT)
    (tmp_path / "hub" / "trusted_list").write_text("owner_name\n")
    code = """
from contextlib import redirect_stderr
arguments = {"skip_validation": True, "trust_repo": True, "verbose": False}
names = torch.hub.list("owner/name:main", **arguments)
help = torch.hub.help("owner/name:main", "trunk_from", skip_validation=True, trust_repo=True)
print(json.dumps([names, help]))
"""
    names, text = in_process(code, tmp_path, TORCH_HOME=str(tmp_path))
    assert names == ["alexnet_from", "resnet50_from", "trunk_from", "vgg16_from"]
    assert text.startswith("Return the trunk of any model")


def test_the_dependencies_are_those_of_the_package(tmp_path: Path) -> None:
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {re.split(r"[^\w-]", one)[0] for one in needed}
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import hubconf; print(json.dumps(hubconf.dependencies))"
    assert set(in_process(code, tmp_path)) == {IMPORTED_AS.get(name, name) for name in names}
