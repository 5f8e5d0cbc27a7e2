"""Which images keep their label: shares against counts, lists against names, and what is held out."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models_helper import write_classes
from torch import Tensor

from deepcluster.core.errors import InputError
from deepcluster.data.sources import ImageSource, open_source
from deepcluster.data.sources.joined import ChosenImages
from deepcluster.evaluation.datasets.label_choice import choose_labelled, hold_out, listed


def mixed(sizes: list[int], seed: int = 0) -> Tensor:
    """Labels with `sizes[c]` images of class c, in a random order."""
    return torch.from_numpy(np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes)))


sizes_of_classes = st.lists(st.integers(1, 40), min_size=1, max_size=8)


@given(sizes_of_classes, st.floats(0.001, 1.0), st.integers(0, 5))
@settings(max_examples=150, deadline=None)
def test_every_class_gives_the_same_number_or_all_it_has(sizes: list[int], share: float, seed: int) -> None:
    labels_N = mixed(sizes)
    indices_M = choose_labelled(labels_N, share, seed)
    assert indices_M.tolist() == sorted(set(indices_M.tolist()))
    counts = torch.bincount(labels_N[indices_M], minlength=len(sizes)).tolist()
    number = max(counts)
    assert number >= 1
    assert counts == [min(number, size) for size in sizes]
    totals = [sum(min(one, size) for size in sizes) for one in range(1, max(sizes) + 1)]
    assert abs(len(indices_M) - share * len(labels_N)) == pytest.approx(
        min(abs(total - share * len(labels_N)) for total in totals)
    )


@given(sizes_of_classes, st.floats(0.001, 1.0), st.floats(0.001, 1.0), st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_a_smaller_share_is_a_part_of_a_larger_one(sizes: list[int], one: float, other: float, seed: int) -> None:
    labels_N = mixed(sizes)
    small, large = (set(choose_labelled(labels_N, share, seed).tolist()) for share in sorted((one, other)))
    assert small <= large


def test_the_choice_is_a_function_of_the_seed() -> None:
    labels_N = mixed([30, 30, 30])
    chosen = [choose_labelled(labels_N, 0.2, seed).tolist() for seed in (1, 1, 2)]
    assert chosen[0] == chosen[1] != chosen[2]


def test_every_image_is_as_likely() -> None:
    labels_N = mixed([10, 10])
    times_N = torch.zeros(20)
    for seed in range(600):
        times_N[choose_labelled(labels_N, 0.3, seed)] += 1
    assert times_N.sum() == 600 * 6
    # Binomial, p = 0.3: a deviation of 11; five of them.
    assert ((times_N - 180).abs() < 56).all()


def test_all_labels_is_all_images() -> None:
    assert choose_labelled(mixed([3, 9, 1]), 1.0, 4).tolist() == list(range(13))


@pytest.mark.parametrize("share", [0.0, 1.5, 10.0, float("nan")])
def test_what_is_no_share_is_told(share: float) -> None:
    with pytest.raises(InputError, match="is not a share of the labels"):
        choose_labelled(mixed([3, 3]), share, 0)


@given(sizes_of_classes, st.floats(0.01, 0.99), st.integers(0, 5))
@settings(max_examples=150, deadline=None)
def test_a_held_part_leaves_each_class_an_image(sizes: list[int], share: float, seed: int) -> None:
    labels_N = mixed(sizes)
    learned, held = hold_out(labels_N, share, seed)
    assert sorted([*learned.tolist(), *held.tolist()]) == list(range(len(labels_N)))
    for label, size in enumerate(sizes):
        count = int((labels_N[held] == label).sum())
        assert count < size
        if size > 1:
            assert count >= 1
            assert abs(count - share * size) <= 1


def test_one_image_a_class_holds_out_none() -> None:
    learned, held = hold_out(torch.tensor([2, 0, 1]), 0.5, 1)
    assert learned.tolist() == [0, 1, 2]
    assert held.tolist() == []


def test_the_held_part_is_a_function_of_the_seed() -> None:
    labels_N = mixed([20, 20])
    held = [hold_out(labels_N, 0.3, seed)[1].tolist() for seed in (1, 1, 2)]
    assert held[0] == held[1] != held[2]


def test_a_class_without_images_is_passed_over() -> None:
    labels_N = torch.tensor([0, 3, 3, 0])
    assert labels_N[choose_labelled(labels_N, 0.5, 0)].sort().values.tolist() == [0, 3]
    assert labels_N[hold_out(labels_N, 0.5, 0)[1]].sort().values.tolist() == [0, 3]


@pytest.fixture
def source(tmp_path: Path) -> ImageSource:
    """Images whose bare names tell them apart, as ImageNet's do, but for `twice.png`."""
    root = write_classes(tmp_path / "train", 4)
    for folder in sorted(root.iterdir()):
        for path in sorted(folder.iterdir()):
            path.rename(folder / f"{folder.name}_{path.name}")
        (folder / f"{folder.name}_003.png").rename(folder / "twice.png")
    return open_source(root)


def write_list(folder: Path, *lines: str) -> Path:
    file = folder / "names.txt"
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


def test_a_list_names_images_in_many_ways(source: ImageSource, tmp_path: Path) -> None:
    file = write_list(
        tmp_path,
        "# bare, as SimCLR's 1percent.txt",
        "class1_002.png\r",
        "",
        "  class0/class0_001.png",
        "train/class2/twice.png",
        "./class2/class2_000.png",
        "class1\\class1_000.png",
        "class1_002.png",
    )
    names = [source.name(index) for index in listed(source, file).tolist()]
    assert names == [
        "class0/class0_001.png",
        "class1/class1_000.png",
        "class1/class1_002.png",
        "class2/class2_000.png",
        "class2/twice.png",
    ]


def test_names_that_are_not_there_are_named_and_counted(source: ImageSource, tmp_path: Path) -> None:
    file = write_list(tmp_path, "class0_000.png", *[f"absent{number}.png" for number in range(5)], "class1/class0_000.png")
    with pytest.raises(
        InputError, match=r"6 of 7 names are not among the 12 training images: absent0.png, absent1.png"
    ) as told:
        listed(source, file)
    assert "class0/class0_000.png" in str(told.value)


def test_a_name_of_several_images_is_told(source: ImageSource, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"twice.png: several training images have that name; write the folder too"):
        listed(source, write_list(tmp_path, "twice.png"))


@pytest.mark.parametrize(("lines", "message"), [((), "names no images"), (("", "# nothing"), "names no images")])
def test_a_list_of_nothing_is_told(source: ImageSource, tmp_path: Path, lines: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        listed(source, write_list(tmp_path, *lines))


def test_a_list_that_is_no_file_is_told(source: ImageSource, tmp_path: Path) -> None:
    for file in (tmp_path / "absent.txt", tmp_path):
        with pytest.raises(InputError, match="can't be read"):
            listed(source, file)


def test_chosen_images_are_those_of_the_source(source: ImageSource) -> None:
    part = ChosenImages(source, np.array([1, 4, 11]), about="with a label")
    assert len(part) == 3
    assert part.labels_N is not None
    assert source.labels_N is not None
    assert part.class_names == source.class_names
    for inner, outer in enumerate((1, 4, 11)):
        assert part.name(inner) == source.name(outer)
        assert part.read(inner) == source.read(outer)
        assert part.path(inner) == source.path(outer)
        assert part.stamp(inner) == source.stamp(outer)
        assert part.labels_N[inner] == source.labels_N[outer]
    assert "12 images" in part.describe()
