"""`download_model.sh` of 2018: the released AlexNet and VGG-16, for PyTorch and for Caffe, into one folder."""

import os
import sys
from argparse import ArgumentParser
from pathlib import Path

from deepcluster.core.errors import InputError
from deepcluster.core.files import output_path
from deepcluster.interop.release2018.common import parser_of

ARCHS = ("alexnet", "vgg16")


def parser() -> ArgumentParser:
    """Return the parser of the script; in 2018 it took no arguments."""
    parser, arguments = parser_of("download_model.sh", "Download the released models into $MODELROOT")
    arguments.add_argument("--accept-licence", action="store_true", help="accept the licence of the models, CC BY-NC 4.0")
    return parser


def main(arguments: list[str]) -> None:
    """Download the models into `$MODELROOT/alexnet` and `$MODELROOT/vgg16`; after an interruption, the same call continues.

    Raises:
        InputError: the licence was not accepted, or a file can't be had.
        Interrupted: what has come so far is kept.
    """
    accepts = parser().parse_args(arguments).accept_licence
    from deepcluster.interop.download import download
    from deepcluster.interop.download.catalogue import CC_BY_NC

    root = output_path(os.environ.get("MODELROOT") or Path.home() / "deepcluster_models", "MODELROOT", is_folder=True)
    print(f"{CC_BY_NC.text}.", flush=True)
    if not accepts and sys.stdin.isatty() and sys.stdout.isatty():
        accepts = input("Do you accept that? [y/N] ").strip().lower() in ("y", "yes")
    if not accepts:
        raise InputError(f"the licence of the models is {CC_BY_NC.name}: if you accept it, repeat with --accept-licence")
    for arch in ARCHS:
        for name in (f"deepcluster-{arch}", f"deepcluster-{arch}-caffe"):
            download(name, root / arch, accept_licence=True)
