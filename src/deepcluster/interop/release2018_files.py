"""Files of the 2018 release: `checkpoint.pth.tar`, the log `clusters`, and the order of images that its numbers stand for.

N images, K clusters.
"""

import os
import pickle
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepcluster.core.errors import InputError
from deepcluster.core.files import written_beside
from deepcluster.core.text import printable
from deepcluster.models.heads import ClusterHead, Head
from deepcluster.models.trunk import Trunk

# Architectures of the release, and the inputs of their first fully connected layer, which belong to images of 224 px.
RELEASED = {"alexnet": 256 * 6 * 6, "vgg16": 512 * 7 * 7}
# What torchvision's ImageFolder takes for an image. The code of 2018 came with a version that knew only the first five.
IMAGE_FOLDER_ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
# Python 2 reads no later protocol.
PROTOCOL = 2
_STOP = b"."
_APPEND = b"a"
# What the release's optimizer keeps beside the rates; torch has added more since.
_SGD_OPTIONS = ("lr", "momentum", "dampening", "weight_decay", "nesterov")


def release_checkpoint(
    trunk: Trunk, head: Head | None, *, epoch: int, optimizer: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the content of a `checkpoint.pth.tar` as the code of 2018 writes and reads it.

    Args:
        trunk: AlexNet or VGG-16 for 224 px.
        head: what was trained on its features; None leaves out `top_layer`, which the scripts of 2018 need.
        epoch: number of epochs that are done.
        optimizer: `state_dict` of the trunk's SGD; None leaves it out, as the released files do.

    Raises:
        InputError: the release has no such network or head.
    """
    state: dict[str, Any] = {"epoch": epoch, "arch": trunk.arch, "state_dict": _state_dict(trunk, head)}
    return state if optimizer is None else {**state, "optimizer": _sgd(optimizer)}


def _state_dict(trunk: Trunk, head: Head | None) -> dict[str, Tensor]:
    """Return all tensors by the release's names, in its order: features, classifier, top layer, Sobel."""
    own = {name: value for name, value in trunk.state_dict().items() if not name.endswith("num_batches_tracked")}
    first = next((value for name, value in own.items() if name.startswith("classifier.")), None)
    if first is None or first.shape[1] != RELEASED.get(trunk.arch):
        size = "" if trunk.arch not in RELEASED else " at this size"
        raise InputError(
            f"the 2018 release has no {trunk.arch}{size}: its files hold {' or '.join(RELEASED)} for images of 224 px; use "
            "another format"
        )
    named = {
        **{name.replace("features.", "features.module."): own[name] for name in own if name.startswith("features.")},
        **{name: own[name] for name in own if name.startswith("classifier.")},
        **({} if head is None else top_layer_of(head)),
        **{name: own[name] for name in own if name.startswith("sobel.")},
    }
    return {name: _kept(value) for name, value in named.items()}


def top_layer_of(head: Head) -> dict[str, Tensor]:
    """Return a head as one linear layer after the ReLU: a BatchNorm of its input is a part of weights and biases."""
    if not isinstance(head, ClusterHead):
        raise InputError("a hierarchical head is no linear layer, which is all that files of the 2018 release can hold")
    weight_KD, bias_K, norm = head.linear.weight, head.linear.bias, head.input.norm
    if norm is not None and norm.running_mean is not None and norm.running_var is not None:
        scale_D = (norm.running_var + norm.eps).rsqrt() * len(norm.running_var) ** -0.5
        weight_KD = weight_KD * scale_D
        bias_K = -weight_KD @ norm.running_mean
    return {"top_layer.weight": weight_KD, "top_layer.bias": bias_K}


def _sgd(optimizer: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state of an SGD with what the release's has."""
    groups = [{name: group[name] for name in ("params", *_SGD_OPTIONS)} for group in optimizer["param_groups"]]
    state = {number: {"momentum_buffer": _kept(one["momentum_buffer"])} for number, one in optimizer["state"].items()}
    return {"state": state, "param_groups": groups}


def _kept(value: Tensor) -> Tensor:
    """Return a tensor as every reader takes it: on the CPU, in the usual order of its numbers, without a gradient."""
    return value.detach().cpu().contiguous()


def image_folder(root: Path) -> tuple[list[str], list[str]]:
    """Return the images below the class folders of `root` as torchvision's ImageFolder lists them, and all classes.

    Returns:
        paths relative to `root`, with forward slashes: class after class by name, in each folder after folder, file after
        file. And the names of all class folders, also of those without images.

    Raises:
        InputError: there is no such folder.
    """
    if not root.is_dir():
        raise InputError(f"{root} is {'a file' if root.exists() else 'not there'}: give a folder that holds class folders")
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    return [path for name in classes for path in _images_below(root, name)], classes


def _images_below(root: Path, name: str) -> Iterator[str]:
    """Yield the images of one class, through links too, but not again through a link to a folder that holds it."""
    top = str(root / name)
    for folder, files in sorted(_walk(top)):
        inside = f"{name}{folder[len(top) :]}".replace(os.sep, "/")
        yield from (f"{inside}/{file}" for file in sorted(files) if file.lower().endswith(IMAGE_FOLDER_ENDINGS))


def _walk(top: str) -> Iterator[tuple[str, list[str]]]:
    above: dict[str, frozenset[tuple[int, int]]] = {}
    for folder, inner, files in os.walk(top, followlinks=True):
        status = os.stat(folder)  # noqa: PTH116 (what os.walk gives is text)
        own, before = (status.st_dev, status.st_ino), above.pop(folder, frozenset())
        if own in before:
            inner.clear()
            continue
        above.update({os.path.join(folder, name): before | {own} for name in inner})  # noqa: PTH118
        yield folder, files


def image_folder_positions(names: Sequence[str], root: Path) -> NDArray[np.int64]:
    """Return the position of each of our images in ImageFolder's list of `root`; -1: it is not there.

    Args:
        names: names of images, relative to `root`, as tables of assignments have them.
    """
    place = {printable(path): number for number, path in enumerate(image_folder(root)[0])}
    return np.array([place.get(name, -1) for name in names], np.int64)


def images_lists(labels_N: Tensor, n_clusters: int) -> list[list[int]]:
    """Return the images of each cluster in ascending order, as the release keeps them; empty clusters are empty lists.

    Args:
        labels_N: cluster of each image of ImageFolder's list, -1 = none.
    """
    order_N = torch.argsort(labels_N, stable=True)
    sizes = torch.bincount(labels_N + 1, minlength=n_clusters + 1).tolist()
    return [part.tolist() for part in order_N.split(sizes)[1:]]


def add_to_clusters(path: Path, lists: Sequence[Sequence[int]], *, new: bool) -> None:
    """Write the clusters of one more epoch at the end of the log `clusters`.

    The file is one pickle of a list of epochs, without classes. A pickle is a program for a stack machine: what another one
    adds to the list is put before its end, so that the epochs before need not be read.

    Args:
        new: begin the log with this epoch, whatever is there.
    """
    epoch = pickle.dumps([list(images) for images in lists], PROTOCOL)
    begin, body = pickle.dumps([], PROTOCOL).removesuffix(_STOP), epoch[2:].removesuffix(_STOP)
    with written_beside(path, durable=True) as beside:
        if new:
            beside.write_bytes(begin)
        else:
            shutil.copyfile(path, beside)
            os.truncate(beside, beside.stat().st_size - len(_STOP))
        with beside.open("ab") as file:
            file.write(body + _APPEND + _STOP)
