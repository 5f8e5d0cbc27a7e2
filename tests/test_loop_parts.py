"""What the loop is made of: its clock, the batches of an epoch, and seeds; by hand and by naive loops."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepcluster.core import seeds, work
from deepcluster.core.distributed import ONE_PROCESS, Ranks
from deepcluster.core.work import Clock
from deepcluster.training.batches import even_batches, part_of_batch
from deepcluster.training.loop import STEPS, new_clock


class Hand:
    """A clock's hand that the test moves."""

    now = 100.0

    def wait(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def hand(monkeypatch: pytest.MonkeyPatch) -> Hand:
    hand = Hand()
    monkeypatch.setattr(work, "time", SimpleNamespace(perf_counter=lambda: hand.now))
    return hand


def spent(**seconds: float) -> dict[str, float]:
    return {**dict.fromkeys(STEPS, 0.0), **seconds}


def test_a_second_is_that_of_the_innermost_step(hand: Hand) -> None:
    clock = new_clock()
    hand.wait(1)  # of no step
    with clock.timed("features"):
        hand.wait(2)
        with clock.timed("whitening"):
            hand.wait(4)
            assert clock.seconds == spent(features=2.0, whitening=4.0)
        hand.wait(8)
        with clock.timed("features"):
            hand.wait(16)
    hand.wait(32)
    with clock.timed("training"):
        hand.wait(64)
        assert clock.seconds == spent(features=26.0, whitening=4.0, training=64.0)
        hand.wait(128)
    assert clock.seconds == spent(features=26.0, whitening=4.0, training=192.0)


def test_a_step_that_is_stopped_is_counted_and_a_saved_clock_goes_on(hand: Hand) -> None:
    clock = new_clock()
    with pytest.raises(KeyboardInterrupt), clock.timed("clustering"), clock.timed("features"):
        hand.wait(3)
        raise KeyboardInterrupt
    hand.wait(5)
    saved = clock.seconds
    assert saved == spent(features=3.0)
    again = Clock(saved)
    with again.timed("clustering"):
        hand.wait(7)
    assert again.seconds == spent(features=3.0, clustering=7.0)
    assert saved == spent(features=3.0) and list(saved) == list(STEPS)


@given(count=st.integers(1, 300), batch_size=st.integers(2, 64))
def test_batches_are_even_and_none_is_too_small_for_batch_norm(count: int, batch_size: int) -> None:
    batches = even_batches(count, batch_size, ONE_PROCESS)
    assert [position for batch in batches for position in range(count)[batch]] == list(range(count))
    sizes = [batch.stop - batch.start for batch in batches]
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= min(2, count)
    # No more than were asked for; three images are one batch of two and one that is too small.
    assert max(sizes) <= max(batch_size, 3)
    assert [part_of_batch(batch, ONE_PROCESS) for batch in batches] == batches


def test_seeds_are_numpys_and_of_their_rank() -> None:
    parts = [(31,), (31, 0, 1), (31, 1), (1, 31), (31, 1, 2)]
    drawn = [seeds.seed_of(*one) for one in parts]
    assert len(set(drawn)) == len(drawn) and all(0 <= seed < 2**63 for seed in drawn)
    for one, seed in zip(parts, drawn, strict=True):
        low, high = np.random.SeedSequence(one).generate_state(2, np.uint32).tolist()
        assert seed == (low + (high << 32)) // 2
        # Zeros at the end count for nothing: the first rank draws as one process does.
        assert seeds.seed_of_rank(ONE_PROCESS, *one) == seeds.seed_of(*one, 0) == seed
    of_ranks = set()
    for rank in range(2):
        ranks = Ranks()
        ranks.rank, ranks.size = rank, 2
        of_ranks.add(seeds.seed_of_rank(ranks, 31, 2))
    assert of_ranks == {seeds.seed_of(31, 2), seeds.seed_of(31, 2, 1)} and len(of_ranks) == 2
