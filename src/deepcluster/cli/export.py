"""`deepcluster export`: a model for other programs."""

from pathlib import Path
from typing import Any

import click

from deepcluster.cli.options import user_options, verbosity_options
from deepcluster.core.progress import Reporter


@click.command(short_help="Write a model for other programs.")
@click.argument("model")
@click.option("--format", required=True, help="torchvision, timm, huggingface, safetensors, onnx, caffe or release2018")
@click.option("--out", type=Path, required=True, help="the file to write; a folder for huggingface and release2018")
@click.option(
    "--output",
    help="onnx: features; embedding (what embed writes); a stage, as its map; projection (points in the space of the "
    "clusters); cluster (with the distance to its centroid)  [features]",
)
@click.option("--input", help="onnx: normalised (float32), or uint8 (pixels from 0 to 255)  [normalised]")
@click.option("--fold-sobel", is_flag=True, help="compose the Sobel layer with the first convolution, for RGB images")
@click.option("--licence", "--license", "licence", help="huggingface: the licence in the model card  [unknown]")
@verbosity_options
def export(model: str, quiet: bool, verbose: bool, **options: Any) -> None:
    """Write a model in the format of another program (docs/export.md).

    MODEL is a run folder, a checkpoint, another program's file of weights, untrained:ARCH or untrained:RUN (random
    weights).
    """
    from deepcluster.interop.exports import export as command

    command(model, reporter=Reporter(quiet=quiet, verbose=verbose), **user_options(options))
