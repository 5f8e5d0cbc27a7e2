"""Rows of an epoch's crops: at the right image, the latest of several, over ranks and after a stop."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from deepcluster.training.memory_bank import MemoryBank
from deepcluster.training.past_features import PastFeatures
from small_runs import assert_equal
from torch import Tensor
from torch.multiprocessing import spawn

from deepcluster.run.folder import RunFolder, load_checkpoint

N, WIDTH = 23, 3
CPU = torch.device("cpu")


def row_of(index: int, position: int) -> list[float]:
    """Tells of which image and position it is; whole in float16."""
    return [index, position, index * position % 64]


def written(draws: list[tuple[int, int]], *, batch: int) -> MemoryBank:
    """A bank that was given these pairs of index and position, so many at a time, with two rows each."""
    bank = MemoryBank()
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
    bank = MemoryBank()
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
    assert_equal(bank.state_dict(), MemoryBank().state_dict())
    other = written(draws(5, 1), batch=2)
    other.load_state_dict(bank.state_dict(), CPU)
    assert len(other) == 0


def test_a_bank_goes_on_from_its_state() -> None:
    given = draws(30, 3)
    whole = written(given, batch=5)
    begun = written(given[:15], batch=5)
    taken_up = MemoryBank()
    taken_up.load_state_dict(begun.state_dict(), CPU)
    for index, position in given[15:]:
        taken_up.write(torch.tensor([index]), torch.tensor([position]), torch.tensor([[row_of(index, position)] * 2]))
    rows = [bank.all()[0] for bank in (taken_up, whole)]
    assert_equal(*rows)
    assert_equal(taken_up.all()[1], whole.all()[1])
    assert_equal(taken_up.all()[2][:, 0], whole.all()[2][:, 0])


# Features of the epoch before


def batches_of(past: PastFeatures) -> dict[int, list[float]]:
    return {
        index: row
        for rows_BC, indices_B in past.batches(4)
        for index, row in zip(indices_B.tolist(), rows_BC.tolist(), strict=True)
    }


def test_features_of_the_epoch_before_replace_those_of_a_first_look() -> None:
    past = PastFeatures(6)
    assert past.is_empty and not batches_of(past)
    kept_BC = past.put(torch.tensor([0, 1, 2, 4, 5]), torch.arange(10.0).view(5, 2) / 3)
    assert not past.is_empty
    torch.testing.assert_close(kept_BC, torch.arange(10.0).view(5, 2) / 3, rtol=2**-11, atol=0)
    assert kept_BC.tolist() == list(batches_of(past).values())
    past.learned(torch.tensor([5, 1]), 0, torch.tensor([[50.0, 0], [10, 0]]))
    past.learned(torch.tensor([4, 5]), 2, torch.tensor([[40.0, 2], [50, 2]]))
    assert batches_of(past)[5] == kept_BC[4].tolist(), "rows are taken over at the end of an epoch"
    past.take_over()
    found = batches_of(past)
    assert found.keys() == {0, 1, 2, 4, 5}, "an image without a row is left out"
    assert (found[1], found[4], found[5]) == ([10, 0], [40, 2], [50, 2])
    assert found[2] == kept_BC[2].tolist()


def test_rows_of_no_image_and_rows_beyond_half_precision() -> None:
    past = PastFeatures(3)
    past.learned(torch.tensor([-1, 0]), 0, torch.tensor([[9.0], [1e6]]))
    past.take_over()
    assert batches_of(past) == {0: [65504.0]}
    assert past.put(torch.tensor([1]), torch.tensor([[-1e9]])).tolist() == [[-65504.0]]


def test_past_features_go_on_from_their_rows() -> None:
    past = PastFeatures(5)
    past.put(torch.arange(4), torch.rand(4, 2))
    past.learned(torch.tensor([3]), 0, torch.ones(1, 2))
    other = PastFeatures(5)
    other.load_rows(past.rows())
    for one in (past, other):
        one.learned(torch.tensor([4, 0]), 1, torch.full((2, 2), 2.0))
        one.take_over()
    assert batches_of(other) == batches_of(past)
    assert batches_of(other)[4] == [2, 2]


# Ranks

EPOCH = draws(40, 7)


def on_rank(rank: int, world: int, folder: Path) -> None:
    """Learn an epoch in batches of ten, of which each rank has its part; the state is kept before the epoch's end."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), world), rank=rank, world_size=world)
    past, bank = PastFeatures(N), MemoryBank()
    mine = torch.arange(past.mine.start, past.mine.stop)
    past.put(mine, torch.tensor([row_of(int(index), 0) for index in mine], dtype=torch.float32))
    for start in range(0, 40, 10):
        first = start + 10 * rank // world
        some = EPOCH[first : start + 10 * (rank + 1) // world]
        indices_B, positions_B = torch.tensor(some).T
        rows_BC = torch.tensor([row_of(*draw) for draw in some], dtype=torch.float32)
        past.learned(indices_B, first, rows_BC)
        bank.write(indices_B, positions_B, rows_BC[:, None])
    run = RunFolder(folder)
    run.save_checkpoint({"epoch": 1, "batch": 4, "labelled": True, "rows": {**past.rows(), "bank": bank.state_dict()}})
    past.take_over()
    torch.save(batches_of(past), folder / f"past-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    RunFolder(folder).create(overwrite=False)
    spawn(on_rank, args=(2, folder), nprocs=2)
    return folder


def expected_rows() -> dict[int, list[float]]:
    """The last row of each image that was learned; of the others that of the first look."""
    latest = {index: row_of(index, 0) for index in range(N)}
    return {**latest, **{index: row_of(index, position) for index, position in EPOCH}}


def test_rows_go_to_the_rank_that_keeps_them(two_ranks: Path) -> None:
    parts = [torch.load(two_ranks / f"past-{rank}.pt", weights_only=True) for rank in range(2)]
    assert list(parts[0]) == list(range(N // 2)) and list(parts[1]) == list(range(N // 2, N))
    assert {**parts[0], **parts[1]} == expected_rows()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_state_of_two_ranks_is_taken_up_by_any_number(world: int, two_ranks: Path) -> None:
    """Each image's rows come to the rank that has its part, whichever learned it, and are those of one process."""
    run = RunFolder(two_ranks)
    state = load_checkpoint(run.last)
    assert len(list(run.checkpoints.glob("rows-*.pt"))) == 2
    found: list[Tensor] = []
    for rank in range(world):
        mine = slice(N * rank // world, N * (rank + 1) // world)
        rows = run.read_rows(state, mine)
        bank = MemoryBank()
        bank.load_state_dict(rows["bank"], CPU)
        indices_M, positions_M, rows_MVP = bank.all()
        assert all(mine.start <= index < mine.stop for index in indices_M.tolist())
        assert torch.equal(rows_MVP[:, 0, 1].long(), positions_M)
        found.append(torch.stack([indices_M, positions_M], dim=1))
        assert rows["past"]["indices"].tolist() == list(range(mine.start, mine.stop))
    assert dict(torch.cat(found).tolist()) == dict(EPOCH)
    past = PastFeatures(N)
    past.load_rows(run.read_rows(state, slice(0, N)))
    past.take_over()
    assert batches_of(past) == expected_rows()
