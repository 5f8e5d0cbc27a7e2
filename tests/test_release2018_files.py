"""Files of the 2018 release: checkpoint, log of clusters, and ImageFolder's order, as torch and torchvision have them."""

import pickle
import pickletools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_release2018_main import write_classes
from torch import nn
from torchvision.datasets import ImageFolder
from torchvision.models import vgg16_bn

from deepcluster.core.errors import InputError
from deepcluster.data.sources import open_source
from deepcluster.interop.release2018_files import (
    add_to_clusters,
    image_folder,
    image_folder_positions,
    images_lists,
    release_checkpoint,
)
from deepcluster.models.archs import make_trunk
from deepcluster.models.heads import ClusterHead, HierarchicalHead, make_head


def test_the_order_of_image_folder(tmp_path: Path) -> None:
    root, photos = tmp_path / "root", write_classes(tmp_path / "photos")
    for name in (
        "b/1.jpg",
        "b/10.jpg",
        "b/2.TIFF",
        "b.c/x.pgm",
        "B/x.ppm",
        "b/z/1.png",
        "b/z-1/1.png",
        "b/z/a/1.gif",
        ".h/1.tif",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    (root / "link").symlink_to(root / "b", target_is_directory=True)
    for folder in (root, photos):
        theirs = ImageFolder(folder, allow_empty=True)
        paths, classes = image_folder(folder)
        assert [str(folder / path) for path in paths] == [path for path, _ in theirs.imgs]
        assert classes == theirs.classes
    source = open_source(photos)
    places = image_folder_positions([source.name(index) for index in range(len(source))], photos)
    images = [path for path, _ in ImageFolder(photos, allow_empty=True).imgs]
    for index, place in enumerate(places):
        name = source.name(index)
        assert images[place] == str(photos / name) if place >= 0 else name == "outside.jpg"
    assert [place for place in places if place >= 0] != sorted(place for place in places if place >= 0)


def test_a_link_to_its_own_folder_ends(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.jpg").write_bytes(b"")
    (tmp_path / "a" / "again").symlink_to(tmp_path / "a", target_is_directory=True)
    assert image_folder(tmp_path) == (["a/1.jpg"], ["a"])


def test_lists_keep_empty_clusters_and_leave_out_unreadable_images() -> None:
    labels_N = torch.tensor([2, -1, 0, 2, 0, 4])
    assert images_lists(labels_N, 6) == [[2, 4], [], [0, 3], [], [5], []]
    assert images_lists(torch.tensor([-1, -1]), 2) == [[], []]


def test_the_log_grows_by_an_epoch_and_is_plain(tmp_path: Path) -> None:
    path, rng = tmp_path / "clusters", np.random.default_rng(0)
    epochs = []
    for number in range(4):
        labels_N = torch.from_numpy(rng.integers(-1, 700, 2000))
        epochs.append([np.flatnonzero(labels_N.numpy() == cluster).tolist() for cluster in range(700)])
        add_to_clusters(path, images_lists(labels_N, 700), new=number == 0)
        with path.open("rb") as file:
            assert pickle.load(file) == epochs
    codes = [code for code, _, _ in pickletools.genops(path.read_bytes())]
    assert max(code.proto for code in codes) == 2  # Python 2 reads it.
    assert not {code.name for code in codes} & {"GLOBAL", "REDUCE", "BUILD", "INST", "NEWOBJ", "OBJ"}
    add_to_clusters(path, [[0]], new=True)
    assert pickle.loads(path.read_bytes()) == [[[0]]]


@pytest.mark.parametrize("norm", [False, True])
def test_a_head_is_one_linear_layer(norm: bool) -> None:
    trunk = make_trunk("alexnet", sobel=False)
    head = make_head(4096, 7, None, norm=norm, seed=3)
    assert isinstance(head, ClusterHead)
    features_BD = 3 * torch.randn(40, 4096, generator=torch.Generator().manual_seed(1)) + 1
    head(features_BD)  # The BatchNorm learns.
    state = release_checkpoint(trunk, head.eval(), epoch=1)["state_dict"]
    ours = head(features_BD)
    theirs = nn.functional.linear(features_BD.relu(), state["top_layer.weight"], state["top_layer.bias"])
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


def test_vgg16_has_the_numbers_of_torchvision() -> None:
    state = release_checkpoint(make_trunk("vgg16", sobel=False), None, epoch=5)
    assert (state["arch"], state["epoch"], "optimizer" in state) == ("vgg16", 5, False)
    with torch.device("meta"):
        theirs = vgg16_bn().state_dict()
    wanted = [name for name in theirs if "num_batches" not in name and not name.startswith("classifier.6")]
    assert [name.replace(".module", "") for name in state["state_dict"]] == wanted
    assert all(value.shape == theirs[name.replace(".module", "")].shape for name, value in state["state_dict"].items())


def test_networks_that_the_release_lacks(tmp_path: Path) -> None:
    def refused(arch: str, head: Any = None, **options: Any) -> str:
        with pytest.raises(InputError, match="2018 release") as fault:
            release_checkpoint(make_trunk(arch, sobel=False, **options), head, epoch=1)
        return str(fault.value)

    assert "has no alexnet-small: its files hold alexnet or vgg16 for images of 224 px" in refused("alexnet-small")
    assert "has no alexnet at this size" in refused("alexnet", image_size=96)
    assert "a hierarchical head" in refused("alexnet", HierarchicalHead(4096, torch.tensor([0, 0, 1]), seed=0))
