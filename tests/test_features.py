"""Step 1 writes each row at its image's index; rows that are kept in memory, in a file or nowhere are the same rows."""

import errno
import os
from collections import namedtuple
from collections.abc import Generator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deepcluster.clustering import features as module
from deepcluster.clustering.whitening import Whitening
from deepcluster.core.errors import InputError, TrainingError
from deepcluster.training.feature_rows import FeatureRows, MemoryPlan, extract_features, kept_dtype, least_bytes, plan_memory

KINDS = ("memory", "file", "twice")
ROWS = torch.rand(30, 5, generator=torch.Generator().manual_seed(0)) * 2


@pytest.mark.parametrize("batch_size", [1, 7, 30])
def test_rows_lie_at_the_index_in_any_order(batch_size: int) -> None:
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    features_ND = extract_features([(ROWS[rows], rows) for rows in order.split(batch_size)], n_images=30, dim=5)
    assert torch.equal(features_ND, ROWS)
    assert features_ND.dtype == torch.float32


def test_images_that_were_not_seen_are_nan() -> None:
    rows = torch.tensor([12, 3, 29])
    features_ND = extract_features([(ROWS[rows], rows)], n_images=30, dim=5)
    assert features_ND[rows].isfinite().all()
    assert features_ND.isnan().all(dim=1).sum() == 27
    assert extract_features([], n_images=4, dim=5).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("given", [torch.bfloat16, torch.float64])
def test_rows_are_kept_in_the_type_that_is_asked_for(dtype: torch.dtype, given: torch.dtype) -> None:
    features_ND = extract_features([(ROWS.to(given), torch.arange(30))], n_images=30, dim=5, dtype=dtype)
    assert features_ND.dtype == dtype
    torch.testing.assert_close(features_ND.float(), ROWS, atol=0.01, rtol=0)


def test_no_gradient_is_kept() -> None:
    rows_BD = ROWS @ torch.ones(5, 5, requires_grad=True)
    assert not extract_features([(rows_BD, torch.arange(30))], n_images=30, dim=5).requires_grad


# Plans


def budgets(n_images: int, dim: int, n_components: int, itemsize: int) -> tuple[int, int]:
    least = least_bytes(n_images, dim, n_components)
    return least, least + n_images * dim * itemsize


@pytest.mark.parametrize(("dim", "itemsize"), [(256, 4), (4096, 2)])
def test_each_kind_is_chosen_at_its_budget(dim: int, itemsize: int, tmp_path: Path) -> None:
    least, all_in_memory = budgets(1000, dim, 64, itemsize)
    expected = {least: "file", all_in_memory - 1: "file", all_in_memory: "memory", 10 * all_in_memory: "memory"}
    for budget, kind in expected.items():
        plan = plan_memory(1000, dim, 64, budget_bytes=budget, folder=tmp_path / "not" / "there" / "yet")
        assert (plan.kind, plan.features_bytes) == (kind, 1000 * dim * itemsize)
        assert plan.memory_bytes == (all_in_memory if kind == "memory" else least) <= budget
    assert plan_memory(1000, dim, 64, budget_bytes=all_in_memory - 1).kind == "twice"
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_means_a_second_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    least, all_in_memory = budgets(1000, 4096, 64, 2)
    for free, kind in ((all_in_memory - least + module.DISK_RESERVE, "file"), (module.DISK_RESERVE, "twice")):
        monkeypatch.setattr("deepcluster.core.device.shutil.disk_usage", lambda folder, free=free: usage(1 << 40, 0, free))
        assert plan_memory(1000, 4096, 64, budget_bytes=least, folder=tmp_path).kind == kind


def test_a_budget_that_is_too_small_says_what_is_needed() -> None:
    with pytest.raises(
        InputError, match=r"--memory 1\.0 GB is too small: the points of 1,281,167 images .* use --memory"
    ) as told:
        plan_memory(1_281_167, 4096, 256, budget_bytes=10**9)
    needed = int(str(told.value).split("use --memory ")[1].split("M ")[0]) * 10**6
    assert plan_memory(1_281_167, 4096, 256, budget_bytes=needed).kind == "twice"


def test_imagenet_fits_into_24_gib_in_memory() -> None:
    plan = plan_memory(1_281_167, 4096, 256, budget_bytes=int(0.6 * 23e9))
    assert (plan.kind, plan.dtype) == ("memory", torch.float16)
    assert plan.memory_bytes < 13e9


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_says_in_a_sentence_where_the_features_are(kind: str, tmp_path: Path) -> None:
    words = {"memory": "in memory", "file": f"temporary file in {tmp_path}", "twice": "looks at the images twice"}
    sentence = MemoryPlan(kind, 10**6, 4096, torch.float16, 10**9, tmp_path).describe()
    assert sentence.startswith("features 8.2 GB as float16 ") and words[kind] in sentence
    assert "1.0 GB" in sentence and "\n" not in sentence


def test_wide_rows_are_never_kept_in_float32() -> None:
    assert kept_dtype(4096, torch.float32) == kept_dtype(1025, torch.float32) == torch.float16
    assert kept_dtype(64, torch.float16) == kept_dtype(64, torch.bfloat16) == torch.float16
    assert kept_dtype(1024, torch.float32) == torch.float32


# Rows that are kept, or made again


def looker(features_ND: Tensor, unreadable: set[int], batch_rows: int) -> module.Look:
    """As a loader gives them: in order, without the images that can't be read, nor batches that have none."""

    def look() -> Generator[tuple[Tensor, Tensor], None, None]:
        for part in torch.arange(len(features_ND)).split(batch_rows):
            rows = part[[i not in unreadable for i in part.tolist()]]
            if len(rows):
                yield features_ND[rows], rows

    return look


def feature_rows(
    kind: str, features_ND: Tensor, folder: Path, *, unreadable: set[int] | None = None, dtype: torch.dtype = torch.float16
) -> FeatureRows:
    plan = MemoryPlan(kind, *features_ND.shape, dtype, 0, folder)
    return FeatureRows(looker(features_ND, unreadable or set(), 10), plan, batch_rows=10)


# The first of a batch, one inside, a whole batch, and the last image of all.
UNREADABLE = {0, 13, *range(20, 30), 54}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_come_back_as_they_were_any_number_of_times(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    features_ND = torch.randn(55, 7, generator=torch.Generator().manual_seed(0))
    seen = [i for i in range(55) if i not in UNREADABLE]
    used: list[Tensor] = []
    with feature_rows(kind, features_ND, tmp_path, unreadable=UNREADABLE, dtype=dtype) as rows:
        rows.fill(used.append)
        assert torch.equal(torch.cat(used), features_ND[seen].to(dtype))
        for _ in range(2):
            again_ND = rows.each(lambda rows_BD: rows_BD.float(), width=7, device=torch.device("cpu"))
            assert torch.equal(again_ND[seen], features_ND[seen].to(dtype).float())
            assert again_ND[sorted(UNREADABLE)].isnan().all()
    assert (rows.n_not_finite, rows.n_clamped) == (0, 0)


@pytest.mark.parametrize("dim", [12, 80])
def test_the_plan_changes_no_bit_of_whitening_and_points(dim: int, tmp_path: Path) -> None:
    """Of fewer columns than rows, and of more."""
    features_ND = torch.randn(55, dim, generator=torch.Generator().manual_seed(0))
    seen = [i for i in range(55) if i not in UNREADABLE]
    expected = Whitening(8).fit(features_ND[seen].half())
    for kind in KINDS:
        whitening = Whitening(8)
        with feature_rows(kind, features_ND, tmp_path, unreadable=UNREADABLE) as rows:
            rows.fill(whitening.update)
            points_NP = rows.each(whitening.finish().transform, width=8, device=torch.device("cpu"))
        assert all(torch.equal(value, expected.state_dict()[name]) for name, value in whitening.state_dict().items())
        if kind == "memory":
            first_NP = points_NP
            torch.testing.assert_close(points_NP[seen], expected.transform(features_ND[seen].half()))
        assert torch.equal(points_NP.nan_to_num(9), first_NP.nan_to_num(9))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_are_not_finite_are_counted_and_left_out(kind: str, tmp_path: Path) -> None:
    features_ND = torch.ones(25, 4)
    features_ND[3, 2], features_ND[17, 0], features_ND[18, 3] = torch.nan, torch.inf, 1e16
    used: list[Tensor] = []
    with feature_rows(kind, features_ND, tmp_path) as rows:
        rows.fill(used.append)
        again_ND = rows.each(lambda rows_BD: rows_BD, width=4, device=torch.device("cpu"))
    assert rows.n_not_finite == 3
    assert again_ND.isnan().all(dim=1).nonzero().flatten().tolist() == [3, 17, 18]
    assert torch.equal(torch.cat(used), torch.ones(22, 4).half())


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_values_beyond_half_precision_are_clamped_and_counted(kind: str, given: torch.dtype, tmp_path: Path) -> None:
    features_ND = torch.ones(25, 4)
    features_ND[3, 2], features_ND[17, 0], features_ND[17, 1] = 1e5, -1e14, 66_000.0
    features_ND[20, 0] = 60_000.0
    with feature_rows(kind, features_ND.to(given), tmp_path) as rows:
        rows.fill(lambda rows_BD: None)
        again_ND = rows.each(lambda rows_BD: rows_BD, width=4, device=torch.device("cpu"))
    assert (rows.n_clamped, rows.n_not_finite) == (2, 0)
    assert again_ND[3].tolist() == [1, 1, 65504, 1]
    assert again_ND[17].tolist() == [-65504, 65504, 1, 1]
    with feature_rows(kind, features_ND, tmp_path, dtype=torch.float32) as rows:
        rows.fill(lambda rows_BD: None)
        exact_ND = rows.each(lambda rows_BD: rows_BD, width=4, device=torch.device("cpu"))
    assert torch.equal(exact_ND, features_ND) and rows.n_clamped == 0


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").is_dir() else 0


def test_the_file_has_no_name_and_is_gone_afterwards(tmp_path: Path) -> None:
    features_ND, before = torch.ones(25, 4), open_files()
    with feature_rows("file", features_ND, tmp_path) as rows:
        rows.fill(lambda rows_BD: None)
        assert open_files() in (0, before + 1)
        assert list(tmp_path.iterdir()) == []
    assert open_files() == before
    with pytest.raises(RuntimeError, match="from fill to close"):
        next(rows.batches())


def test_the_file_is_gone_after_an_error(tmp_path: Path) -> None:
    def stop(rows_BD: Tensor) -> None:
        raise KeyboardInterrupt

    before = open_files()
    with pytest.raises(KeyboardInterrupt), feature_rows("file", torch.ones(25, 4), tmp_path) as rows:
        rows.fill(stop)
    assert open_files() == before
    assert list(tmp_path.iterdir()) == []


def test_a_look_that_is_broken_off_is_closed(tmp_path: Path) -> None:
    """So that its progress bar goes, and what it waits for is let go."""
    closed: list[bool] = []

    def look() -> Generator[tuple[Tensor, Tensor], None, None]:
        try:
            for first in range(0, 30, 10):
                yield ROWS[first : first + 10], torch.arange(first, first + 10)
        finally:
            closed.append(True)

    def stop(images: int) -> None:
        raise KeyboardInterrupt

    with FeatureRows(look, MemoryPlan("twice", 30, 5, torch.float32, 0), batch_rows=10) as rows:
        rows.fill(lambda rows_BD: None)
        with pytest.raises(KeyboardInterrupt) as caught:
            rows.each(lambda rows_BD: rows_BD, width=5, device=torch.device("cpu"), on_batch=stop)
    del caught
    assert closed == [True, True]


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    rows = feature_rows("file", torch.ones(25, 4), tmp_path)
    monkeypatch.setattr(module.os, "posix_fallocate", full, raising=False)
    with pytest.raises(TrainingError, match=r"features, 200 B, could not .* No space left on device\. Make room"):
        rows.fill(lambda rows_BD: None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux that is always full")
def test_a_disk_that_fills_up_on_the_way_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where room can't be had at once."""
    monkeypatch.delattr(module.os, "posix_fallocate", raising=False)
    monkeypatch.setattr(module.tempfile, "TemporaryFile", lambda dir: Path("/dev/full").open("r+b"))  # noqa: SIM115
    with pytest.raises(TrainingError, match="No space left on device"):
        feature_rows("file", torch.ones(25, 4096), tmp_path).fill(lambda rows_BD: None)


def test_a_folder_that_does_not_exist_is_told(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="No such file or directory"):
        feature_rows("file", torch.ones(25, 4), tmp_path / "gone").fill(lambda rows_BD: None)
