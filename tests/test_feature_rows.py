"""Where features are kept between extraction and whitening: the choice of the place, and what is kept of a row."""

import errno
import os
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from deepcluster.core.errors import InputError, TrainingError
from deepcluster.training import feature_rows as module
from deepcluster.training.feature_rows import MemoryPlan, as_kept, least_bytes, plan_memory


def budgets(n_images: int, dim: int, n_components: int, itemsize: int) -> tuple[int, int]:
    least = least_bytes(n_images, dim, n_components)
    return least, least + n_images * dim * itemsize


@pytest.mark.parametrize(("dim", "itemsize"), [(256, 4), (4096, 2)])
def test_each_place_is_chosen_at_its_budget(dim: int, itemsize: int, tmp_path: Path) -> None:
    least, all_in_memory = budgets(1000, dim, 64, itemsize)
    folder = tmp_path / "not" / "there" / "yet"
    places = {least: folder, all_in_memory - 1: folder, all_in_memory: None, 10 * all_in_memory: None}
    for budget, place in places.items():
        plan = plan_memory(1000, dim, 64, budget_bytes=budget, folder=folder)
        assert (plan.folder, plan.features_bytes) == (place, 1000 * dim * itemsize)
        assert plan.other_bytes == least <= budget
    assert list(tmp_path.iterdir()) == []


def test_without_room_in_memory_and_on_disk_the_sizes_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    least, all_in_memory = budgets(1000, 4096, 64, 2)
    needed = all_in_memory - least + module.DISK_RESERVE
    monkeypatch.setattr("deepcluster.core.device.shutil.disk_usage", lambda folder: usage(1 << 40, 0, needed))
    assert plan_memory(1000, 4096, 64, budget_bytes=least, folder=tmp_path).folder == tmp_path
    monkeypatch.setattr("deepcluster.core.device.shutil.disk_usage", lambda folder: usage(1 << 40, 0, needed - 1))
    with pytest.raises(
        InputError, match=r"features of 1,000 images, 8 MB, fit neither into --memory .*; allow more"
    ) as told:
        plan_memory(1000, 4096, 64, budget_bytes=least, folder=tmp_path)
    enough = int(str(told.value).split("more --memory (")[1].split("M)")[0]) * 10**6
    assert plan_memory(1000, 4096, 64, budget_bytes=enough, folder=tmp_path).folder is None
    with pytest.raises(InputError, match="allow more --memory"):
        plan_memory(1000, 4096, 64, budget_bytes=all_in_memory - 1)


def test_a_budget_that_is_too_small_says_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"--memory 1\.0 GB is too small: the points of 1,281,167 images .* use --memory"
    ) as told:
        plan_memory(1_281_167, 4096, 256, budget_bytes=10**9)
    needed = int(str(told.value).split("use --memory ")[1].split("M ")[0]) * 10**6
    assert least_bytes(1_281_167, 4096, 256) <= needed < least_bytes(1_281_167, 4096, 256) + 10**6


def test_imagenet_fits_into_24_gib_in_memory() -> None:
    plan = plan_memory(1_281_167, 4096, 256, budget_bytes=int(0.6 * 23e9))
    assert (plan.folder, plan.dtype) == (None, torch.bfloat16)
    assert plan.features_bytes + plan.other_bytes < 13e9


def test_a_plan_says_in_a_sentence_where_the_features_are(tmp_path: Path) -> None:
    for folder, words in ((None, "in memory"), (tmp_path, f"temporary file in {tmp_path}")):
        sentence = MemoryPlan(10**6, 4096, torch.bfloat16, 10**9, folder).describe()
        assert sentence.startswith("features 8.2 GB as bfloat16 ") and words in sentence
        assert "1.0 GB" in sentence and "\n" not in sentence


@pytest.mark.parametrize(
    ("dim", "computed", "kept"),
    [
        (4096, torch.float32, torch.bfloat16),
        (1025, torch.float32, torch.bfloat16),
        (1024, torch.float32, torch.float32),
        (64, torch.bfloat16, torch.bfloat16),
    ],
)
def test_wide_rows_are_never_kept_in_float32(dim: int, computed: torch.dtype, kept: torch.dtype) -> None:
    assert plan_memory(10, dim, 8, budget_bytes=1 << 40, computed=computed).dtype == kept


# Rows in memory, or in a file


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").is_dir() else 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_file_holds_rows_as_memory_does_and_has_no_name(dtype: torch.dtype, tmp_path: Path) -> None:
    features_ND = torch.randn(55, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = open_files()
    for folder in (None, tmp_path):
        rows_MD = MemoryPlan(55, 7, dtype, 0, folder).allocate()
        assert (rows_MD.shape, rows_MD.dtype) == ((55, 7), dtype)
        for part in torch.arange(55).split(10):
            rows_MD[part] = features_ND[part]
        assert torch.equal(rows_MD, features_ND)
        assert list(tmp_path.iterdir()) == []
        del rows_MD
    assert open_files() == before


def test_a_full_disk_is_an_error_before_the_first_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module.os, "posix_fallocate", full, raising=False)
    with pytest.raises(TrainingError, match=r"features, 200 B, could not .* No space left on device\. Make room"):
        MemoryPlan(25, 4, torch.bfloat16, 0, tmp_path).allocate()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="No such file or directory"):
        MemoryPlan(25, 4, torch.bfloat16, 0, tmp_path / "gone").allocate()


# What is kept of a row


def test_rows_that_are_not_finite_are_counted_and_become_nan() -> None:
    features_ND = torch.ones(25, 4)
    features_ND[3, 2], features_ND[17, 0], features_ND[18, 3] = torch.nan, torch.inf, 1e16
    kept_ND, n_bad = as_kept(features_ND, torch.bfloat16)
    assert n_bad == 3
    assert kept_ND.isnan().all(dim=1).nonzero().flatten().tolist() == [3, 17, 18]
    assert torch.equal(kept_ND[~kept_ND[:, 0].isnan()], torch.ones(22, 4).bfloat16())


@pytest.mark.parametrize("scale", [1e-25, 1e-11, 1.0, 1e5, 1e13])
@pytest.mark.parametrize("kept", [torch.bfloat16, torch.float32])
def test_very_small_and_large_features_are_kept(scale: float, kept: torch.dtype) -> None:
    """Those of an untrained MobileNet are about 1e-9, those of an EfficientNet 1e-13: float16 would make them zeros."""
    features_ND = scale * torch.randn(25, 4, generator=torch.Generator().manual_seed(0))
    kept_ND, n_bad = as_kept(features_ND, kept)
    assert n_bad == 0
    torch.testing.assert_close(kept_ND.double(), features_ND.double(), rtol=2**-8, atol=0)
    computed_ND = features_ND.bfloat16()
    assert torch.equal(as_kept(computed_ND, kept)[0], computed_ND.to(kept))
