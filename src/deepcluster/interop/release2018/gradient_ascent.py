"""`gradient_ascent.py` of 2018: a picture of each filter of a layer; on our `visualize filters --objective published`."""

from argparse import ArgumentParser
from typing import TYPE_CHECKING

from deepcluster.core.errors import InputError
from deepcluster.interop.release2018.common import check_layer, folder_of, open_model, parser_of, say

if TYPE_CHECKING:
    from pathlib import Path

    from deepcluster.run.model import Model
    from deepcluster.visualization.options import FilterOptions

SCRIPT = "gradient_ascent.py"


def parser() -> ArgumentParser:
    """Return the parser of the script."""
    parser, arguments = parser_of(SCRIPT, "Gradient ascent visualisation")
    arguments.add_argument("--model", help="path of the model")
    arguments.add_argument("--arch", default="alexnet", choices=["alexnet", "vgg16"], help="architecture of the model")
    arguments.add_argument("--conv", type=int, default=1, help="convolutional layer, counted from 1")
    arguments.add_argument("--exp", default="", help="folder of the pictures")
    arguments.add_argument("--lr", type=float, default=3, help="length of a step (default: 3)")
    arguments.add_argument("--wd", type=float, default=1e-5, help="weight decay, the number itself (default: 1e-5)")
    arguments.add_argument("--sig", type=float, default=0.3, help="deviation of the blur in pixels (default: 0.3)")
    arguments.add_argument("--step", type=int, default=5, help="steps between blurs (default: 5)")
    arguments.add_argument("--niter", type=int, default=1000, help="number of steps (default: 1000)")
    arguments.add_argument("--idim", type=int, default=224, help="side of the pictures in pixels (default: 224)")
    return parser


def main(arguments: list[str]) -> None:
    """Write `convN/layerN-channelC.jpeg` of every channel.

    Raises:
        InputError: the model or an option can't be used.
        Interrupted: the pictures written so far are kept.
    """
    args = parser().parse_args(arguments)
    from deepcluster.visualization.options import FilterOptions

    options = FilterOptions(
        stage=f"conv{args.conv}",
        objective="published",
        steps=args.niter,
        image_size=args.idim,
        lr=args.lr,
        weight_decay=args.wd,
        sigma=args.sig,
        blur_every=args.step,
    )
    with open_model(args.model, advice="the pictures made so far are kept; the command starts again") as model:
        if model.trunk.arch.partition("-")[0] != args.arch:
            raise InputError(
                f"--arch {args.arch}: {model.name} holds {model.trunk.arch}; name its own architecture, or use "
                "`deepcluster visualize filters`, which takes any"
            )
        check_layer(model, args.conv)
        folder = folder_of(args.exp) / f"conv{args.conv}"
        folder.mkdir(exist_ok=True)
        write_pictures(model, options, folder, args.conv)


def write_pictures(model: "Model", options: "FilterOptions", folder: "Path", conv: int) -> None:
    """Write a picture of every channel, batch by batch, and print their numbers."""
    from PIL import Image

    from deepcluster.core.files import written_beside
    from deepcluster.visualization.ascent import Responses, default_batch_size, filter_pictures, settings_of

    settings, stage = settings_of(options, model.image_size), f"conv{conv}"
    trunk = model.copy_of_trunk()
    responses = Responses(trunk, stage, model.machine, size=settings.image_size, made_for=model.image_size)
    size = default_batch_size(responses)
    with model.work.track(f"filters of {stage}", responses.n_channels * settings.steps, unit="steps") as advance:
        for first in range(0, responses.n_channels, size):
            channels = [*range(first, min(first + size, responses.n_channels))]
            pictures_BHW3, _ = filter_pictures(responses, settings, channels, advance)
            for channel, picture_HW3 in zip(channels, pictures_BHW3, strict=True):
                with written_beside(folder / f"layer{conv}-channel{channel}.jpeg") as beside:
                    Image.fromarray(picture_HW3).save(beside, "JPEG")
                say(str(channel), end=" ")
    say("")
