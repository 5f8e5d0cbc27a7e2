"""Rows of an epoch's crops: at the right image, the latest of several, over ranks and after a stop."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from small_runs import assert_equal
from torch import Tensor
from torch.multiprocessing import spawn

from deepcluster.core.distributed import group
from deepcluster.run.folder import RunFolder, load_checkpoint
from deepcluster.run.settings import Settings
from deepcluster.training.bank import Bank

N, WIDTH = 23, 3
CPU = torch.device("cpu")


def row_of(index: int, position: int) -> list[float]:
    """Tells of which image and position it is; whole in float16."""
    return [index, position, index * position % 64]


def written(draws: list[tuple[int, int]], *, batch: int) -> Bank:
    """A bank that was given these pairs of index and position, so many at a time, with two rows each."""
    bank = Bank(CPU)
    for start in range(0, len(draws), batch):
        some = draws[start : start + batch]
        indices_B, positions_B = torch.tensor(some).T
        rows_BVP = torch.tensor([[row_of(*draw), [-one for one in row_of(*draw)]] for draw in some])
        bank.write(indices_B, positions_B, rows_BVP)
    return bank


def draws(count: int, seed: int) -> list[tuple[int, int]]:
    rng = np.random.default_rng(seed)
    return [(int(index), position) for position, index in enumerate(rng.integers(0, N, count))]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("batch", [1, 4, 100])
def test_of_an_image_that_comes_often_the_last_row_is_kept(seed: int, batch: int) -> None:
    """Against a dictionary; batches may come out of order, as those of several ranks do."""
    given = draws(40, seed)
    latest = dict(sorted(given, key=lambda draw: draw[1]))
    shuffled = [given[i] for i in np.random.default_rng(seed).permutation(40)]
    indices_M, positions_M, rows_MVP = written(shuffled, batch=batch).all()
    assert dict(zip(indices_M.tolist(), positions_M.tolist(), strict=True)) == latest
    assert indices_M.tolist() == sorted(latest)
    expected = torch.tensor([row_of(*draw) for draw in sorted(latest.items())])
    assert torch.equal(rows_MVP[:, 0].float(), expected.float())
    assert torch.equal(rows_MVP[:, 1].float(), -expected.float())


def test_rows_are_kept_in_half_precision_and_without_a_gradient() -> None:
    bank = Bank(CPU)
    rows_BVP = torch.full((1, 1, 2), 1 / 3, requires_grad=True)
    bank.write(torch.tensor([4]), torch.tensor([0]), rows_BVP)
    kept = bank.all()[2]
    assert kept.dtype == torch.float16 and not kept.requires_grad
    torch.testing.assert_close(kept.float(), rows_BVP.detach(), rtol=2**-11, atol=0)


def test_an_empty_bank_and_one_that_was_cleared() -> None:
    bank = written(draws(5, 0), batch=2)
    assert len(bank) == 5
    bank.clear()
    assert len(bank) == 0
    assert_equal(bank.state_dict(), Bank(CPU).state_dict())
    other = written(draws(5, 1), batch=2)
    other.load_state_dict(bank.state_dict())
    assert len(other) == 0


def test_a_bank_goes_on_from_its_state() -> None:
    given = draws(30, 3)
    whole = written(given, batch=5)
    begun = written(given[:15], batch=5)
    taken_up = Bank(CPU)
    taken_up.load_state_dict(begun.state_dict())
    for index, position in given[15:]:
        taken_up.write(torch.tensor([index]), torch.tensor([position]), torch.tensor([[row_of(index, position)] * 2]))
    rows = [bank.all()[0] for bank in (taken_up, whole)]
    assert_equal(*rows)
    assert_equal(taken_up.all()[1], whole.all()[1])
    assert_equal(taken_up.all()[2][:, 0], whole.all()[2][:, 0])


# Ranks

EPOCH = draws(40, 7)


def on_rank(rank: int, world: int, folder: Path) -> None:
    """Train an epoch in batches of ten, of which each rank has its part; the state is saved at the epoch's end."""
    torch.set_num_threads(1)
    with group(dist.FileStore(str(folder / "store"), world), rank, world) as ranks:
        bank = Bank(CPU)
        for start in range(0, 40, 10):
            some = EPOCH[start + 10 * rank // world : start + 10 * (rank + 1) // world]
            indices_B, positions_B = torch.tensor(some).T
            rows_BC = torch.tensor([row_of(*draw) for draw in some], dtype=torch.float32)
            bank.write(indices_B, positions_B, rows_BC[:, None])
        run = RunFolder(folder, ranks)
        run.save_checkpoint(
            {"settings": Settings().as_dict(), "epoch": 1, "batch": 4, "labelled": True, "rows": {"bank": bank.state_dict()}}
        )
        torch.save(bank.at_owners(N, (1, WIDTH), ranks), folder / f"owned-{rank}.pt")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    RunFolder(folder).create(overwrite=False)
    spawn(on_rank, args=(2, folder), nprocs=2)
    return folder


def expected_rows() -> Tensor:
    """The last row of each image, NaN where there is none."""
    rows_NVC = torch.full((N, 1, WIDTH), torch.nan)
    for index, position in EPOCH:
        rows_NVC[index, 0] = torch.tensor(row_of(index, position), dtype=torch.float32)
    return rows_NVC


def test_rows_go_to_the_rank_that_owns_the_image(two_ranks: Path) -> None:
    parts = [torch.load(two_ranks / f"owned-{rank}.pt", weights_only=True) for rank in range(2)]
    assert [len(part) for part in parts] == [N // 2, N - N // 2]
    assert_equal(torch.cat(parts).float(), expected_rows())


def test_one_process_owns_all_images() -> None:
    bank = Bank(CPU)
    for index, position in EPOCH:
        bank.write(torch.tensor([index]), torch.tensor([position]), torch.tensor([[row_of(index, position)]]))
    owned_NVC = bank.at_owners(N, (1, WIDTH))
    assert_equal(owned_NVC.float(), expected_rows())
    assert bool(owned_NVC.isnan().any())
    assert Bank(CPU).at_owners(3, (2, WIDTH)).isnan().all() and Bank(CPU).at_owners(3, (2, WIDTH)).shape == (3, 2, WIDTH)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_state_of_two_ranks_is_resumed_by_any_number(world: int, two_ranks: Path) -> None:
    """The rows of each image come to the rank that owns it, whichever trained on it, and are those of one process."""
    run = RunFolder(two_ranks)
    state = load_checkpoint(run.last)
    assert len(list(run.checkpoints.glob("rows-*.pt"))) == 2
    found: list[Tensor] = []
    for rank in range(world):
        mine = slice(N * rank // world, N * (rank + 1) // world)
        bank = Bank(CPU)
        bank.load_state_dict(run.read_rows(state, mine)["bank"])
        indices_M, positions_M, rows_MVP = bank.all()
        assert all(mine.start <= index < mine.stop for index in indices_M.tolist())
        assert torch.equal(rows_MVP[:, 0, 1].long(), positions_M)
        found.append(torch.stack([indices_M, positions_M], dim=1))
    assert dict(torch.cat(found).tolist()) == dict(EPOCH)
