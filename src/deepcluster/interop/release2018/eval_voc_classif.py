"""`eval_voc_classif.py` of 2018: fine-tuning on Pascal VOC 2007; on our protocol `voc07-classification`."""

from argparse import ArgumentParser
from pathlib import Path
from typing import TYPE_CHECKING

from deepcluster.interop.release2018.common import Meters, open_model, parser_of, say

if TYPE_CHECKING:
    from torch import Tensor

    from deepcluster.evaluation.measures.rankings import AveragePrecisions
    from deepcluster.evaluation.options import VocClassificationOptions
    from deepcluster.run.model import Model

LINE_STEPS = 25


def parser() -> ArgumentParser:
    """Return the parser of the script."""
    parser, arguments = parser_of("eval_voc_classif.py")
    splits = ["train", "trainval"]
    crops = "whether to test on ten random crops of each image (1) or on ten fixed ones (0)"
    arguments.add_argument("--vocdir", default="", help="folder of VOC 2007, with JPEGImages and ImageSets/Main")
    arguments.add_argument("--split", default="train", choices=splits, help="images to train on")
    arguments.add_argument("--model", default="", help="path of the model")
    arguments.add_argument("--nit", type=int, default=80000, help="number of training iterations")
    arguments.add_argument("--fc6_8", type=int, default=1, help="whether to train only the fully connected layers (1, 0)")
    arguments.add_argument("--train_batchnorm", type=int, default=0, help="whether to train BatchNorm's scales, too (1, 0)")
    arguments.add_argument("--eval_random_crops", type=int, default=1, help=crops)
    arguments.add_argument("--stepsize", type=int, default=5000, help="iterations between halvings of the rate")
    arguments.add_argument("--lr", type=float, default=0.003, help="learning rate")
    arguments.add_argument("--wd", type=float, default=1e-6, help="weight decay, the number itself")
    arguments.add_argument("--min_scale", type=float, default=0.1, help="smallest share of the image that a crop shows")
    arguments.add_argument("--max_scale", type=float, default=0.5, help="largest share of the image that a crop shows")
    arguments.add_argument("--seed", type=int, default=31, help="random seed")
    return parser


def main(arguments: list[str]) -> None:
    """Train on a split, and print the average precisions on it and on the other.

    Raises:
        InputError: the model, the data or an option can't be used.
        Interrupted: the state is kept; the same command continues.
    """
    args = parser().parse_args(arguments)
    say(str(args))
    from deepcluster.evaluation.datasets import voc
    from deepcluster.evaluation.options import VocClassificationOptions
    from deepcluster.evaluation.voc07_classification import crop_size, fine_tune, make_classifier, test_on

    options = VocClassificationOptions(
        finetune="fc6-8" if args.fc6_8 else "all",
        split=args.split,
        train_batchnorm=bool(args.train_batchnorm),
        iterations=args.nit,
        halve_every=args.stepsize,
        lr=args.lr,
        weight_decay=args.wd,
        crop_scale=(args.min_scale, args.max_scale),
        test_crops="random" if args.eval_random_crops else "fixed",
        seed=args.seed,
    )
    with open_model(args.model, advice="the state is saved: the same command continues from here") as model:
        train, test = voc.splits_for(voc.open_voc(Path(args.vocdir)), args.split)
        say(f"PASCAL VOC 2007 {args.split} dataset loaded")
        classifier = make_classifier(model.copy_of_trunk(), options)
        size = crop_size(model, options.image_size)
        say("Start training")
        training, resumable = fine_tune(model, classifier, train, size, options, Lines(model, options, len(train.names)))
        say("Evaluation")
        for name, split in (("Train set", train), ("Test set", test)):
            say(name)
            say(line_of(test_on(split, "testing", model, training, resumable, size, options)[0]))
        resumable.done()


class Lines:
    """Prints a line now and then, and each new learning rate, as steps are taken."""

    def __init__(self, model: "Model", options: "VocClassificationOptions", n_images: int) -> None:
        self.options, self.meters = options, Meters()
        self.steps_per_epoch = -(-n_images // options.batch_size)

    def __call__(self, number: int, loss: "Tensor", started: float) -> None:
        """Take notice of a step."""
        from deepcluster.evaluation.voc07_classification import rate

        if number and number % self.options.halve_every == 0:
            say(f"iter {number} learning rate is {rate(self.options, number)}")
        self.meters.add({"Loss": loss}, self.options.batch_size, started=started)
        if number % LINE_STEPS == 0:
            say(f"Iteration[{number}]\t{self.meters.line(data=True)}\t")
        if (number + 1) % self.steps_per_epoch == 0:
            self.meters.restart()


def line_of(found: "AveragePrecisions") -> str:
    """Return the mean and the average precision of each class; `nan` where no image shows it."""
    from deepcluster.evaluation.datasets import voc

    each = (found.by_class.get(name, float("nan")) for name in voc.CLASSES)
    return f"{found.mean}    {' '.join(f'{one:.2f}' for one in each)}"
