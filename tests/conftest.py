"""What many tests share: small images and one finished run, both made once and never changed."""

import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

# As the command line sets it, before torch is imported: threads that wait by spinning slow each other on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Tests leave nothing in the cache of the person who runs them, and find nothing there.
os.environ["DEEPCLUSTER_CACHE"] = tempfile.mkdtemp(prefix="deepcluster-tests-")

from small_runs import train_small
from spoiled_images import write_good_images

# No test is timed: a busy machine is no fault.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


def pytest_configure() -> None:
    # A shell that starts the tests in the background has them ignore SIGINT, which some tests send.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["DEEPCLUSTER_CACHE"], ignore_errors=True)


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A flat folder of 60 images of all kinds."""
    folder = tmp_path_factory.mktemp("images") / "photos"
    write_good_images(folder, 60, size=(36, 32))
    return folder


@pytest.fixture(scope="session")
def trained(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run of `small_runs.SMALL` on `images`."""
    return train_small(images, tmp_path_factory.mktemp("runs") / "trained")
