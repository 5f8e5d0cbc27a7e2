"""Measures of groups against classes: naive counts in float64, scikit-learn, all permutations, properties."""

from collections import Counter
from itertools import combinations, permutations
from math import log, sqrt

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from deepcluster.clustering.assignment import Assignment
from deepcluster.core.errors import InputError
from deepcluster.evaluation.measures.rankings import MEASURES, agreement

PAIRS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4)), min_size=1, max_size=40)


def naive_nmi(groups: list[int], labels: list[int]) -> float:
    n = len(groups)

    def entropy(values: list[int]) -> float:
        return -sum(count / n * log(count / n) for count in Counter(values).values())

    both = -sum(count / n * log(count / n) for count in Counter(zip(groups, labels, strict=True)).values())
    mean = sqrt(entropy(groups) * entropy(labels))
    shared = entropy(groups) + entropy(labels) - both
    return float(entropy(groups) == entropy(labels)) if mean == 0 else shared / mean


def naive_adjusted_rand(groups: list[int], labels: list[int]) -> float:
    """By every pair of images."""
    pairs = [
        (groups[one] == groups[other], labels[one] == labels[other]) for one, other in combinations(range(len(groups)), 2)
    ]
    together, in_group, in_class = (sum(map(test, pairs)) for test in (all, lambda pair: pair[0], lambda pair: pair[1]))
    chance = in_group * in_class / max(1, len(pairs))
    highest = (in_group + in_class) / 2
    return 1.0 if highest == chance else (together - chance) / (highest - chance)


def naive_accuracy(groups: list[int], labels: list[int]) -> float:
    """The best of all ways to give each group a class of its own, or none."""
    names, classes = sorted(set(groups)), sorted(set(labels))
    classes += [-1] * max(0, len(names) - len(classes))
    counts = Counter(zip(groups, labels, strict=True))
    best = max(
        sum(counts[name, label] for name, label in zip(names, chosen, strict=True))
        for chosen in permutations(classes, len(names))
    )
    return best / len(groups)


def naive_purity(groups: list[int], labels: list[int]) -> float:
    counts = Counter(zip(groups, labels, strict=True))
    most = [max(count for (group, _), count in counts.items() if group == name) for name in set(groups)]
    return sum(most) / len(groups)


NAIVE = {"nmi": naive_nmi, "adjusted_rand": naive_adjusted_rand, "accuracy": naive_accuracy, "purity": naive_purity}


@given(PAIRS)
def test_equals_the_naive_measures(pairs: list[tuple[int, int]]) -> None:
    """More groups than classes, fewer, numbers without an image: all are among the examples."""
    groups, labels = (list(side) for side in zip(*pairs, strict=True))
    found = agreement(groups, labels)
    assert tuple(found) == MEASURES == tuple(NAIVE)
    for measure, naive in NAIVE.items():
        assert found[measure] == pytest.approx(naive(groups, labels), abs=1e-9), measure


@given(PAIRS, st.permutations(range(6)), st.permutations(range(5)), st.randoms(use_true_random=False))
def test_numbers_and_order_do_not_matter(pairs, group_names, class_names, random) -> None:  # type: ignore[no-untyped-def]
    groups, labels = zip(*pairs, strict=True)
    renamed = [(10 * group_names[group], 7 * class_names[label]) for group, label in pairs]
    random.shuffle(renamed)
    found = agreement(*zip(*renamed, strict=True))
    assert found == pytest.approx(agreement(groups, labels), abs=1e-9)


@given(PAIRS)
def test_bounds(pairs: list[tuple[int, int]]) -> None:
    groups, labels = zip(*pairs, strict=True)
    found = agreement(groups, labels)
    assert 0 < found["accuracy"] <= found["purity"] <= 1
    assert -1e-9 <= found["nmi"] <= 1 + 1e-9
    assert found["purity"] >= max(Counter(labels).values()) / len(labels) - 1e-12
    assert agreement(labels, labels) == pytest.approx(dict.fromkeys(MEASURES, 1.0))


def test_equals_scikit_learn_on_many_images() -> None:
    rng = np.random.default_rng(0)
    labels_N = rng.integers(30, size=5000)
    groups_N = np.where(rng.random(5000) < 0.5, labels_N * 3, rng.integers(100, size=5000))
    found = agreement(groups_N, labels_N)
    assert found["nmi"] == pytest.approx(normalized_mutual_info_score(labels_N, groups_N, average_method="geometric"))
    assert found["adjusted_rand"] == pytest.approx(adjusted_rand_score(labels_N, groups_N))
    # Half of the images, and of the others those that fall right by chance.
    assert 0.5 < found["accuracy"] < found["purity"] < 0.6


def test_nmi_is_that_of_a_training_run() -> None:
    """One number under one name, whatever prints it."""
    labels_N = torch.tensor([0, 0, 1, 2, 2, 1, 0, 2])
    clusters = Assignment(torch.tensor([0, 0, 1, 1, 2, 3, 0, 2]), torch.zeros(8), torch.zeros(4, 3), (), 0)
    assert agreement(clusters.labels_N, labels_N)["nmi"] == pytest.approx(clusters.nmi(labels_N))


def test_a_split_class_costs_accuracy_and_not_purity() -> None:
    """By hand: six images of class 0 in groups 0 and 1, two of class 1 in group 2."""
    found = agreement([0, 0, 0, 0, 1, 1, 2, 2], [0, 0, 0, 0, 0, 0, 1, 1])
    assert (found["accuracy"], found["purity"]) == (6 / 8, 1.0)


def test_a_greedy_matching_would_be_worse() -> None:
    """Overlaps 5, 4 / 4, 0: greedy takes 5 and 0, the best is 4 and 4."""
    groups, labels = [0] * 9 + [1] * 4, [0] * 5 + [1] * 4 + [0] * 4
    assert agreement(groups, labels)["accuracy"] == 8 / 13


def test_images_without_group_or_class_are_left_out() -> None:
    assert agreement([0, 0, 1, -1, 2], [1, 1, 0, 0, -1]) == pytest.approx(dict.fromkeys(MEASURES, 1.0))


def test_what_can_not_be_compared_is_told() -> None:
    with pytest.raises(InputError, match=r"none of the 2 images has both"):
        agreement([-1, 0], [0, -1])
    with pytest.raises(InputError, match=r"\(3,\) and classes \(2,\)"):
        agreement([0, 1, 2], [0, 1])
