"""`eval_retrieval.py` of 2018: R-MAC on Oxford5k and Paris6k, in five stages that leave their results in a folder."""

from argparse import ArgumentParser
from pathlib import Path

from deepcluster.core.errors import InputError
from deepcluster.core.files import output_path
from deepcluster.core.progress import Reporter
from deepcluster.interop.release2018.common import open_model, parser_of, say

PRETRAINED = "pretrained"
STAGES = ["extract_train", "train_pca", "db_features", "q_features", "eval"]
# Torchvision's weights of a supervised VGG-16, where torch.hub keeps them.
PRETRAINED_FILE = "vgg16_bn-6c64b313.pth"


def parser() -> ArgumentParser:
    """Return the parser of the script."""
    parser, arguments = parser_of("eval_retrieval.py", "Evaluate retrieval on the buildings of Oxford and Paris")
    cities = ["Oxford", "Paris"]
    arguments.add_argument("--S", type=int, default=1024, help="longer side of the images in pixels")
    arguments.add_argument("--L", type=int, default=3, help="levels of regions")
    arguments.add_argument("--n_pca", type=int, default=512, help="numbers of a descriptor after PCA")
    arguments.add_argument("--model", default=PRETRAINED, help="path of the model; pretrained: torchvision's VGG-16")
    arguments.add_argument("--dataset", required=True, help="folder of the data set, with jpg/ and lab/")
    arguments.add_argument("--dataset_name", default="Oxford", choices=cities, help="name of the data set")
    arguments.add_argument("--stage", default=STAGES[0], choices=STAGES, help="what to do")
    arguments.add_argument("--eval_binary", required=True, help="path of the program compute_ap")
    arguments.add_argument("--temp_dir", default="", help="folder of features, PCA and rankings")
    arguments.add_argument("--multires", action="store_true", help="no effect, now as then")
    arguments.add_argument("--aqe", type=int, help="no effect, now as then")
    arguments.add_argument("--dbe", type=int, help="no effect, now as then")
    return parser


def main(arguments: list[str]) -> None:
    """Carry out one stage.

    Raises:
        InputError: the model, the data or an option can't be used, or an earlier stage is missing.
        Interrupted: the files written so far are kept; the same command starts with the first image again.
    """
    args = parser().parse_args(arguments)
    for name, at_least in (("S", 1), ("L", 1), ("n_pca", 1)):
        if getattr(args, name) < at_least:
            text = "the own size of the images is not supported" if name == "S" else "it must be positive"
            raise InputError(f"--{name} {getattr(args, name)}: {text}; use {at_least} or more")
    if args.multires or args.aqe or args.dbe:
        better = "`deepcluster evaluate retrieval` has --multiscale and --query-expansion"
        Reporter().warn(f"--multires, --aqe and --dbe had no effect in 2018 and have none here: {better}")
    from deepcluster.interop.release2018 import retrieval_stages as stages

    say(f"Prepare the dataset from  {args.dataset}")
    dataset = stages.open_dataset(Path(args.dataset))
    folder = output_path(args.temp_dir or ".", "--temp_dir", is_folder=True)
    folder.mkdir(parents=True, exist_ok=True)
    files = stages.Files(folder, args.dataset_name, args.S, args.L)
    if args.stage == "train_pca":
        stages.train_pca(files, args.n_pca)
    elif args.stage == "eval":
        stages.score(dataset, files, args.eval_binary)
    else:
        advice = "what was written is kept; run the same command again"
        name = _pretrained() if args.model == PRETRAINED else args.model
        with open_model(name, advice=advice) as model:
            if args.stage == "extract_train":
                stages.extract_train(model, dataset, files)
            else:
                stages.describe(model, dataset, files, args.stage)


def _pretrained() -> str:
    """Return torchvision's supervised VGG-16, as `load` takes it."""
    import torch

    say("loading supervised pretrained VGG-16")
    path = Path(torch.hub.get_dir()) / "checkpoints" / PRETRAINED_FILE
    if not path.is_file():
        raise InputError(
            f"--model {PRETRAINED} is torchvision's VGG-16, and {path} is not there: let torchvision fetch it "
            "(torchvision.models.vgg16_bn(weights='IMAGENET1K_V1')), or name a model"
        )
    return f"vgg16@{path}"
