"""Published numbers: sourced, sensible, found; and the documentation shows the very same."""

import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import timm

from deepcluster.evaluation.options import PROTOCOLS
from deepcluster.evaluation.published import (
    IMAGES,
    Published,
    comparable_table,
    published,
    published_for,
    published_table,
)
from deepcluster.models.archs import ARCHITECTURES, TIMM

PAGES = [Path(__file__).parents[1] / "docs" / name for name in ("evaluation.md", "dense.md")]
# A paper with its table, or a repository with its file, thread or pull request.
SOURCE = re.compile(r"(.+ (et al\.|and \w+), .+, table .+)|([\w.-]+/[\w.-]+, (\S+\.(md|rst)|(issue|pull request) \d+).*)")


@pytest.mark.parametrize("row", published(), ids=lambda row: f"{row.protocol}-{row.data}-{row.system}"[:60])
def test_every_row_is_complete(row: Published) -> None:
    assert row.protocol in PROTOCOLS
    assert SOURCE.fullmatch(row.source)
    assert row.numbers and all(0 < value < 100 for value in row.numbers.values())
    assert row.data and row.system and is_known(row.arch)
    assert row.data in IMAGES or not re.match(r"VOC|COCO|Cityscapes", row.data)


def is_known(arch: str) -> bool:
    """Whether `train --arch` takes it; timm's names are asked of timm."""
    return arch in ARCHITECTURES or (arch.startswith(TIMM) and timm.is_model(arch.removeprefix(TIMM)))


def test_every_protocol_has_rows_that_were_checked() -> None:
    for protocol in PROTOCOLS:
        assert any(row.checked for row in published_for(protocol)), protocol


def test_no_row_is_there_twice() -> None:
    keys = [(row.protocol, row.data, row.system, row.arch, row.source) for row in published()]
    assert len(keys) == len(set(keys))


def test_more_labelled_images_and_better_features_mean_more() -> None:
    """Slips of the pen: of each table, labels beat DeepCluster, which beats random weights (the best of each row)."""
    dense = ("voc07-detection", "voc0712-detection", "voc12-segmentation")
    for protocol in ("linear", "voc07-classification", "voc07-svm", "semi-supervised", "retrieval", *dense):
        for data in dict.fromkeys(row.data for row in published_for(protocol)):
            for arch in ("alexnet", "resnet50", "vgg16"):
                rows = [row for row in published_for(protocol) if (row.data, row.arch) == (data, arch)]
                by_kind = {
                    kind: [max(row.numbers.values()) for row in rows if row.system.startswith(kind)]
                    for kind in ("random", "DeepCluster", "trained on")
                }
                levels = [values for values in by_kind.values() if values]
                assert all(max(worse) < max(better) for worse, better in pairwise(levels)), rows
    for row in published_for("voc07-svm"):
        values = list(row.numbers.values())[1:]
        assert values == sorted(values)
    for row in published_for("semi-supervised"):
        assert row.numbers["1 % of labels"] < row.numbers["10 % of labels"]


def test_what_is_remembered_says_so() -> None:
    paper = next(row for row in published_for("linear") if row.numbers.get("conv3") == 41.0)
    assert paper.cited() == "from memory of Caron et al., arXiv 1807.05520v2, table 1, not checked"
    assert next(row for row in published_for("voc07-classification") if row.numbers == {"fc6-8": 70.4}).cited() == (
        "facebookresearch/deepcluster, README.md"
    )


@pytest.mark.parametrize("name", ["cifar10", "CIFAR-10", "cifar_10"])
def test_only_the_same_data_and_network_are_compared(name: str) -> None:
    rows = published_for("knn", name, "resnet18-small")
    assert [(row.data, row.arch) for row in rows] == [("CIFAR-10", "resnet18-small")] * 2
    assert published_for("knn", name, "resnet50") == published_for("knn", "my photos") == []
    assert published_for("linear", None, "vgg16") == []
    table = comparable_table("knn", name, "resnet18-small")
    assert table is not None and [row[3] for row in table.rows] == ["k=200 84.2", "k=200 88.4"]


def test_what_was_not_checked_is_compared_with_its_mark() -> None:
    table = comparable_table("linear", "ImageNet", "alexnet")
    assert table is not None
    assert [(row[0], row[-1]) for row in table.rows] == [
        ("DeepCluster", "from memory of Caron et al., arXiv 1807.05520v2, table 1, not checked"),
        ("DeepCluster", "from memory of Caron et al., ECCV 2018, table 1, not checked"),
        ("SeLa, 10,000 clusters", "yukimasano/self-label, README.md"),
    ]


def test_a_part_of_a_data_set_under_its_name_is_not_compared() -> None:
    assert comparable_table("linear", "imagenet", "alexnet", {"classes": 1000}) is not None
    assert comparable_table("linear", "imagenet", "alexnet", {"classes": 4}) is None


@pytest.mark.parametrize("folder", ["VOCdevkit", "VOC2007", "my data", "VOC07 test"])
def test_a_data_set_in_a_folder_of_any_name_is_known_by_the_images_tested_on(folder: str) -> None:
    """VOC's 20 classes are also in a small part of it, such as `voc2012-mini`; so are all of COCO's and Cityscapes'."""
    table = comparable_table("voc07-svm", folder, "resnet50", {"classes": 20, "test_images": 4_952})
    assert table is not None and len(table.rows) == len(published_for("voc07-svm", "VOC07 test", "resnet50")) > 2
    for counts in ({"classes": 20, "test_images": 49}, {"classes": 20}, {}, {"test_images": 4_951}):
        assert comparable_table("voc07-svm", folder, "resnet50", counts) is None
    assert comparable_table("voc07-svm", folder, "alexnet", {"test_images": 4_952}) is None


@pytest.mark.parametrize(
    ("protocol", "whole", "others"),
    [
        ("voc0712-detection", {"train_images": 16_551, "test_images": 4_952}, [5_011, 11_540]),
        ("voc12-segmentation", {"train_images": 10_582, "test_images": 1_449}, [1_464]),
    ],
)
def test_what_was_trained_on_more_images_is_not_compared(protocol: str, whole: dict[str, int], others: list[int]) -> None:
    """Such as VOC 2007 alone, or VOC 2012 without the masks of SBD."""
    table = comparable_table(protocol, "VOCdevkit", "resnet50", whole)
    assert table is not None and len(table.rows) > 8
    for count in others:
        assert comparable_table(protocol, "VOCdevkit", "resnet50", whole | {"train_images": count}) is None


def test_unknown_protocols_have_none() -> None:
    assert published_for("guessing") == []
    assert published_table("guessing") is None


def test_a_table_row_by_hand() -> None:
    table = published_table("retrieval")
    assert table is not None
    assert list(table.rows[1]) == [
        "trained on ImageNet's labels, Sobel",
        "Oxford5k, Paris6k",
        "vgg16",
        "Oxford5k 72.4, Paris6k 81.5",
        "facebookresearch/deepcluster, issue 58, which quotes the paper",
    ]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_documentation_shows_this_very_table(protocol: str) -> None:
    table = published_table(protocol)
    assert table is not None
    pages = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    section = pages.split(f"\n## `{protocol}`\n")[1].split("\n## ")[0]
    assert table.render("markdown") in section


def test_it_needs_no_torch() -> None:
    """Tables of published numbers cost no seconds of loading."""
    code = "import sys, deepcluster.evaluation.published; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
