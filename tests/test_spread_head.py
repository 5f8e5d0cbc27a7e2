"""A head in two steps whose layers are on one rank each: learns what one process learns; its state moves between ranks.

B images of a batch, D features, K clusters.
"""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing import spawn

from deepcluster.core.device import Machine
from deepcluster.core.distributed import Route, data_parallel, my_part, rank
from deepcluster.models.heads import HierarchicalHead
from deepcluster.run.settings import Settings
from deepcluster.training.optim import (
    Learner,
    gradient_length,
    head_optimizer,
    make_optimizer,
)

BATCH, DIM, STEPS = 24, 6, 3
CASES: dict[str, dict[str, Any]] = {
    "sgd": {"head_momentum": 0.9, "weight_decay": 0.01},
    "clipped": {"clip_gradient": 0.05},
    "lars": {"optimizer": "lars", "head_momentum": 0.9, "weight_decay": 0.01},
}
SUPERS = {"sizes": (5, 0, 2, 7, 1), "few": (3, 4)}  # Of three ranks one has no layer of the few.
RATES = (0.1, 0.2)


class Rows(nn.Module):
    """A trunk of one layer: features, and rows that are the same."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, DIM)
        with torch.no_grad():
            for number, weight in enumerate(self.parameters()):
                weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(number)))

    def forward(self, images_BC: Tensor) -> tuple[Tensor, Tensor]:
        features_BD = self.layer(images_BC)
        return features_BD, features_BD


def learner_of(case: str, supers: str, machine: Machine) -> Learner:
    settings, sizes = Settings(**CASES[case]), torch.tensor(SUPERS[supers])
    head = HierarchicalHead(DIM, torch.arange(len(sizes)).repeat_interleave(sizes), len(sizes), seed=3).to(machine.dtype)
    trunk = Rows().to(machine.dtype)
    optimizers = (
        make_optimizer(list(trunk.parameters()), settings, machine, momentum=0.9),
        head_optimizer(head, settings, machine),
    )
    return Learner(data_parallel(trunk, machine.device), head, optimizers, machine, settings.clip_gradient)


def batch(step: int, n_clusters: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Images of all ranks, and their labels; one counts for nothing, and ranks' parts have not all super-classes."""
    generator = torch.Generator().manual_seed(step)
    labels_B = torch.randint(n_clusters, (BATCH,), generator=generator).sort().values
    labels_B[step] = -1
    return torch.randn(BATCH, 4, generator=generator).to(dtype), labels_B


def learn(learner: Learner, steps: range) -> list[float]:
    """Losses of this rank's parts of the batches."""
    losses, n_clusters = [], len(learner.head.super_of_cluster_K)  # type: ignore[arg-type]
    for step in steps:
        images_BC, labels_B = (part[my_part(BATCH)] for part in batch(step, n_clusters, learner.machine.dtype))
        losses.append(float(learner.step(images_BC, labels_B, rates=RATES, seed=0, total=BATCH)[0]))
    return losses


def state_of(learner: Learner) -> dict[str, Any]:
    """What is saved of the head, and the trunk's weights."""
    trunk = {name.removeprefix("module."): value for name, value in learner.network.state_dict().items()}
    return {"trunk": trunk, **learner.head_state()}


def together(states: list[dict[str, Any]]) -> dict[str, Any]:
    """The state that all ranks have left: no part of it is on two of them."""
    parts: dict[str, dict[str, Any]] = {}
    for state in states:
        for kind, named in state["parts"].items():
            assert not set(named) & set(parts.get(kind, {}))
            parts.setdefault(kind, {}).update(named)
    return {**states[0], "parts": parts}


def work(number: int, world: int, folder: Path) -> None:
    """What each rank does; it is written down."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), world), rank=number, world_size=world)
    found: dict[str, Any] = {}
    for case in CASES:
        for supers in SUPERS:
            learner = learner_of(case, supers, Machine.choose("cpu", "fp64"))
            losses = learn(learner, range(STEPS))
            found[f"{case} {supers}"] = {"losses": losses, **state_of(learner)}
    # In bf16 features and their gradients travel as such.
    learner = learner_of("sgd", "sizes", Machine.choose("cpu", "bf16"))
    found["bf16"] = learn(learner, range(STEPS))
    found["route"] = travel(number, world)
    torch.save(found, folder / f"found-{number}.pt")
    dist.destroy_process_group()


def travel(number: int, world: int) -> dict[str, Tensor]:
    """Numbered rows to ranks by turns and back, with gradients that tell where they were made; the first rank has none."""
    to_M = torch.arange(5 * number) * 7 % world
    rows_M2 = torch.stack([torch.full((len(to_M),), 100.0 * number), torch.arange(len(to_M)) + 0.0], dim=1).requires_grad_()
    route = Route(to_M)
    arrived_R2 = route.there(rows_M2)
    back_M2 = route.back(arrived_R2 * (1 + rank()))
    back_M2.sum().backward()
    assert rows_M2.grad is not None
    return {
        "to": to_M,
        "rows": rows_M2.detach(),
        "there": arrived_R2.detach(),
        "back": back_M2.detach(),
        "grad": rows_M2.grad,
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[dict[str, Any]]]:
    """What each of so many ranks found."""
    found: dict[int, list[dict[str, Any]]] = {}

    def of(world: int) -> list[dict[str, Any]]:
        if world not in found:
            folder = tmp_path_factory.mktemp(f"world{world}")
            spawn(work, args=(world, folder), nprocs=world)
            found[world] = [torch.load(folder / f"found-{number}.pt") for number in range(world)]
        return found[world]

    return of


@pytest.mark.parametrize("supers", SUPERS)
@pytest.mark.parametrize("case", CASES)
def test_ranks_learn_what_one_process_learns(case: str, supers: str, ranks: Callable[[int], list[dict[str, Any]]]) -> None:
    """Losses, the trunk, the head of the super-classes, and each layer and its momentum, which one rank alone has."""
    alone = learner_of(case, supers, Machine.choose("cpu", "fp64"))
    losses, expected = learn(alone, range(STEPS)), state_of(alone)
    found = [each[f"{case} {supers}"] for each in ranks(3)]
    torch.testing.assert_close([sum(parts) for parts in zip(*(each["losses"] for each in found), strict=True)], losses)
    for each in found:
        for kind in ("trunk", "head"):
            torch.testing.assert_close(each[kind], expected[kind])
        torch.testing.assert_close(each["head_optimizer"]["state"], expected["head_optimizer"]["state"])
    torch.testing.assert_close(together(found)["parts"], expected["parts"])
    start = learner_of(case, supers, Machine.choose("cpu", "fp64")).head.state_dict()
    # Of a super-class of one cluster there is nothing to be learned.
    layers = expected["parts"]["head"]
    learned = [name for name in layers if SUPERS[supers][int(name.split(".")[1])] > 1]
    assert not any(torch.equal(layers[name], start[name]) for name in learned)
    if supers == "few":
        assert [len(each["parts"]["head"]) for each in found] == [2, 2, 0]


def test_one_process_takes_up_what_three_have_left(ranks: Callable[[int], list[dict[str, Any]]]) -> None:
    states = [each["sgd sizes"] for each in ranks(3)]
    whole, taken = (learner_of("sgd", "sizes", Machine.choose("cpu", "fp64")) for _ in range(2))
    learn(whole, range(STEPS))
    taken.network.load_state_dict(whole.network.state_dict())
    taken.optimizers[0].load_state_dict(deepcopy(whole.optimizers[0].state_dict()))
    taken.load_head_state(together(states))
    torch.testing.assert_close(learn(taken, range(STEPS, 6)), learn(whole, range(STEPS, 6)))
    torch.testing.assert_close(state_of(taken)["parts"], state_of(whole)["parts"])


def test_features_travel_in_bf16(ranks: Callable[[int], list[dict[str, Any]]]) -> None:
    expected = learn(learner_of("sgd", "sizes", Machine.choose("cpu", "bf16")), range(STEPS))
    found = [sum(parts) for parts in zip(*(each["bf16"] for each in ranks(3)), strict=True)]
    assert found == pytest.approx(expected, rel=2e-2)


def test_rows_and_gradients_find_their_way(ranks: Callable[[int], list[dict[str, Any]]]) -> None:
    found = [each["route"] for each in ranks(3)]
    for number, each in enumerate(found):
        expected = torch.cat([other["rows"][other["to"] == number] for other in found])
        assert torch.equal(each["there"], expected) and len(expected) > 0
        factors_M = 1 + each["to"]
        assert torch.equal(each["back"], each["rows"] * factors_M[:, None])
        assert torch.equal(each["grad"], factors_M[:, None].expand(-1, 2).float())


def test_the_length_of_a_gradient_is_over_all_its_weights() -> None:
    weights = [nn.Parameter(torch.zeros(3)) for _ in range(3)]
    for number, weight in enumerate(weights[:2]):
        weight.grad = torch.full((3,), number + 1.0)
    assert float(gradient_length(weights)) == pytest.approx(15**0.5)
    assert float(gradient_length(weights, weights[1:])) == pytest.approx(15**0.5)
