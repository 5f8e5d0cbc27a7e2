"""The program does bit for bit what golden/records hold: `pytest -m golden [-k NAME]`, see golden/record.py."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from golden.record import GOLDEN, compare_record, make_record, other_environment

pytestmark = pytest.mark.golden


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder of the data and runs that several golden runs share."""
    folder = tmp_path_factory.mktemp("golden")
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name: str, work: Path) -> None:
    if other_environment():
        pytest.skip("; ".join(other_environment()))
    assert not compare_record(name, make_record(name, work))
