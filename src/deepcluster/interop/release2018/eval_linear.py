"""`eval_linear.py` of 2018: a linear classifier on one frozen stage of an AlexNet, tested after each epoch."""

from argparse import ArgumentParser
from contextlib import ExitStack
from pathlib import Path

from deepcluster.interop.release2018.common import check_arch, folder_of, needed, open_model, parser_of, weight_decay_of

SCRIPT = "eval_linear.py"


def parser() -> ArgumentParser:
    """Return the parser of the script."""
    parser, arguments = parser_of(SCRIPT, "Train a linear classifier on a frozen convolutional layer of an AlexNet.")
    arguments.add_argument("--data", help="folder of the data set, with train/ and val/")
    arguments.add_argument("--model", help="path of the model")
    arguments.add_argument("--conv", type=int, choices=[1, 2, 3, 4, 5], help="convolutional layer under the classifier")
    arguments.add_argument("--tencrops", action="store_true", help="test on ten crops of each image")
    arguments.add_argument("--exp", default="", help="folder of logs and checkpoints")
    arguments.add_argument("--workers", type=int, default=4, help="processes that load images (default: 4)")
    arguments.add_argument("--epochs", type=int, default=90, help="epochs to train (default: 90)")
    arguments.add_argument("--batch_size", type=int, default=256, help="images per step (default: 256)")
    arguments.add_argument("--lr", type=float, default=0.01, help="learning rate (default: 0.01)")
    arguments.add_argument("--momentum", type=float, default=0.9, help="momentum (default: 0.9)")
    decay = "weight decay, as a power of ten (default: -4)"
    arguments.add_argument("--weight_decay", "--wd", type=float, default=-4, help=decay)
    arguments.add_argument("--seed", type=int, default=31, help="random seed (default: 31)")
    arguments.add_argument("--verbose", action="store_true", help="print a line every 100 batches")
    return parser


def main(arguments: list[str]) -> None:
    """Train and test the classifier; write the logs and the checkpoints.

    Raises:
        InputError: the model, the data or an option can't be used.
        Interrupted: the state is kept; the same command continues.
    """
    args = parser().parse_args(arguments)
    from deepcluster.evaluation.datasets.labelled import open_train_val
    from deepcluster.evaluation.options import LinearOptions
    from deepcluster.interop.release2018.probe import Probe

    data = Path(needed(args.data, "--data", "name the folder that holds train/ and val/"))
    options = LinearOptions(
        stages=f"conv{needed(args.conv, '--conv', 'give the number of a convolutional layer, 1 to 5')}",
        epochs=args.epochs,
        batch_size=args.batch_size,
        lr=args.lr,
        momentum=args.momentum,
        weight_decay=weight_decay_of(args.weight_decay),
        ten_crops=args.tencrops,
        seed=args.seed,
    )
    advice = "the state is saved: the same command continues from here"
    with open_model(args.model, workers=args.workers, advice=advice) as model, ExitStack() as opened:
        check_arch(model, SCRIPT, ("alexnet",), "`deepcluster evaluate linear`")
        parts = open_train_val(data)
        Probe(model, parts, options, folder_of(args.exp), verbose=args.verbose, opened=opened).run()
