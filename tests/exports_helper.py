"""Models to export, and what an export prints."""

from pathlib import Path
from typing import Any

import torch
from models_helper import make_model
from torch import nn

from deepcluster.core.progress import Reporter
from deepcluster.interop.exports import export
from deepcluster.run.model import Model


def with_statistics(model: Model) -> Model:
    """Give the BatchNorms statistics that change what they return, as training does."""
    generator = torch.Generator().manual_seed(5)
    for layer in model.trunk.modules():
        if isinstance(layer, nn.BatchNorm2d) and layer.running_mean is not None and layer.running_var is not None:
            layer.running_mean.normal_(std=0.1, generator=generator)
            layer.running_var.uniform_(0.5, 2, generator=generator)
    return model


def model_of(cache: Path, arch: str, size: int, *, sobel: bool = False, **settings: Any) -> Model:
    return with_statistics(make_model(cache, arch=arch, image_size=size, sobel=sobel, **settings))


class Lines:
    """A stream that keeps what is printed."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None:
        pass


def printed(model: Model, **options: Any) -> str:
    lines = Lines()
    export(model, reporter=Reporter(stream=lines), **options)
    return lines.text
