"""What learns most in a given time: k-NN and linear top-1 on held-out images after some seconds of training, by recipe.

    python benchmarks/recipes.py --data cifar10-train.tar.gz --images 4400 --seconds 50,100,150 \\
        --try today: --try "four crops: crops=4x24 lr=0.1" --try "first version: method=deepcluster" --seeds 1,2,3
    python benchmarks/recipes.py --data cifar10-train.tar.gz --held cifar10-test.tar.gz --seconds 1800 --seeds 1,2,3
    python benchmarks/recipes.py --data cifar10-train.tar.gz --device cuda --seconds 60,120,240

The result is a table of mean and deviation over the seeds, with a row for the untrained trunk of each recipe: a difference
smaller than the deviations is none. `--data` is a folder with class folders, or a tar of one. Every tenth image is held out,
to choose by; or `--held` names other images, to report what was chosen. Training starts from the settings of `--recipe`
(auto: those that `train --method deepcluster-v2` would choose), changed by `--set NAME=VALUE` for all recipes, and by
`--try "NAME: SETTING=VALUE …"` for one. It goes on until the last moment: the learning rate rises over the first 5 % of the
time and falls along a cosine to zero at the end, so earlier moments are on the way there. Seconds are those of the clock on
a GPU, and CPU-seconds of the process on a CPU; decoding at the start and the evaluation are not counted, features and
clustering are. Labels are used for the evaluation only: 20 neighbours by cosine, and a logistic regression on standardised
features, both of centre views.

`--narrow 4` gives the layers of a ResNet a quarter of their channels, for comparisons on a CPU.
"""

import argparse
import ast
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from math import cos, pi
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from input import copied
from torch import Tensor, nn

from deepcluster.core.device import Machine
from deepcluster.core.progress import Reporter
from deepcluster.core.work import Work
from deepcluster.data.cache import CachePlan, decoded_images
from deepcluster.data.loader import Batch, Loader
from deepcluster.data.sources import open_source
from deepcluster.data.survey import survey
from deepcluster.data.views import ClusterView
from deepcluster.evaluation.knn import knn_accuracy
from deepcluster.evaluation.logistic import fit_logistic
from deepcluster.models.trunk import Trunk
from deepcluster.run.auto import choose_settings
from deepcluster.run.features import image_features, make_run_trunk
from deepcluster.run.settings import V2, Settings
from deepcluster.training.deepcluster import DeepCluster
from deepcluster.training.deepcluster_v2 import DeepClusterV2
from deepcluster.training.fitting import begin_trunk, fit_whitening
from deepcluster.training.loop import Loop
from deepcluster.training.method import Method, Step

HELD_OUT = 10
WARM_UP = 0.05
ROW = dict[str, float]


class Finished(Exception):
    """The last moment has passed."""


class ByTheClock(Method):
    """A method whose learning rate is a function of the time, and which calls `look` at given moments."""

    moments: Sequence[float]
    look: Callable[["ByTheClock", float, int], None]

    def begin(self, moments: Sequence[float], look: Callable[["ByTheClock", float, int], None]) -> None:
        """Start the clock."""
        self.moments, self.look, self.last, self.crops_seen = sorted(moments), look, max(moments), 0
        self.started = self.now()

    def now(self) -> float:
        """Return seconds of the clock that counts."""
        return time.perf_counter() if self.machine.device.type == "cuda" else time.process_time()

    def train_step(self, batch: Batch, step: Step) -> Tensor:
        seconds = self.now() - self.started
        if self.moments and seconds >= self.moments[0]:
            if self.machine.device.type == "cuda":
                torch.cuda.synchronize()
            paused = self.now()
            self.moments = [moment for moment in self.moments if moment > seconds]
            self.look(self, paused - self.started, self.crops_seen)
            if not self.moments:
                raise Finished
            for network in self.networks:
                network.train()
            self.started += self.now() - paused
        self.crops_seen += sum(map(len, batch.crops))
        share = min(1.0, seconds / self.last)
        factor = min(1.0, share / WARM_UP) * 0.5 * (1 + cos(pi * share))
        return super().train_step(batch, replace(step, factor=factor))


class FirstByTheClock(ByTheClock, DeepCluster):
    """The method of 2018, by the clock."""


class SecondByTheClock(ByTheClock, DeepClusterV2):
    """DeepCluster-v2, by the clock."""


def split(
    data: Path, n_images: int, to: Path, *, every: int = HELD_OUT, names: tuple[str, str] = ("known", "held")
) -> tuple[Path, Path]:
    """Copy images to two folders of class folders, with every tenth image of each class in the second."""
    known, held = copied(data, n_images, to / names[0], cache=to / "cache"), to / names[1]
    for folder in known.iterdir():
        for path in sorted(folder.iterdir())[::every]:
            (held / folder.name).mkdir(parents=True, exist_ok=True)
            shutil.move(path, held / folder.name / path.name)
    return known, held


def narrowed(trunk: Trunk, divisor: int) -> Trunk:
    """Return a ResNet with fewer channels in each layer, and new random weights."""
    torch.manual_seed(0)
    for module in list(trunk.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, nn.Conv2d):
                into = layer.in_channels // divisor if layer.in_channels % 64 == 0 else layer.in_channels
                same = {key: getattr(layer, key) for key in ("kernel_size", "stride", "padding")}
                other = nn.Conv2d(into, layer.out_channels // divisor, bias=False, **same)
                nn.init.kaiming_normal_(other.weight, mode="fan_out", nonlinearity="relu")
                setattr(module, name, other)
            elif isinstance(layer, nn.BatchNorm2d):
                setattr(module, name, nn.BatchNorm2d(layer.num_features // divisor))
    trunk.dim //= divisor
    return trunk


@contextmanager
def loaded(folder: Path, settings: Settings, machine: Machine) -> Iterator[Loader]:
    """Yield a loader of the decoded images of a folder."""
    images = decoded_images(open_source(folder), CachePlan(0, memory_bytes=1 << 40), reduce_to=settings.reduce_to)
    with closing(Loader(images, workers=settings.workers or 0, device=machine.device)) as loader:
        loader.fill(lambda _: None)
        yield loader


def scores(trunk: Trunk, machine: Machine, size: int, loaders: Sequence[Loader]) -> ROW:
    """Return the k-NN and linear top-1 on the images of the second loader, from those of the first."""
    started, rows, labels = time.perf_counter(), [], []
    for loader in loaders:
        rows.append(image_features(trunk, loader, machine, trunk.embed_stage, ClusterView(size)).float())
        labels.append(torch.from_numpy(loader.images.source.labels_N))
    knn = knn_accuracy(rows[0], labels[0], rows[1], labels[1])
    linear = fit_logistic(rows[0], labels[0], int(labels[0].max()) + 1, seed=0, device=machine.clustering_device)
    top_1 = linear.accuracy(rows[1], labels[1])[0]
    return {"knn": knn, "linear": top_1, "evaluation_s": time.perf_counter() - started}


def learn(
    folders: tuple[Path, Path],
    options: Mapping[str, Any],
    moments: Sequence[float],
    tell: Callable[[str, ROW], None],
    narrow: int = 1,
) -> None:
    """Train on the images of the first folder; tell the scores on those of the second at some moments.

    Args:
        options: settings, as the user of `train` would give them.
        moments: seconds of training.
        tell: called with a title and a row of figures: for the untrained network, and at each moment.
        narrow: divisor of the channels of a ResNet.
    """
    settings, _ = choose_settings(
        {"method": V2, **options}, survey(open_source(folders[0]), workers=0, on_images=lambda _: None)
    )
    settings = replace(settings, epochs=10**6)  # The clock ends it.
    machine = Machine.choose(settings.device, settings.precision)
    with loaded(folders[0], settings, machine) as known, loaded(folders[1], settings, machine) as held:
        trunk, work = make_run_trunk(settings), Work(Reporter(quiet=True))
        trunk = narrowed(trunk, narrow) if narrow > 1 else trunk
        begin_trunk(trunk, known, machine, settings, work)
        size, n_images = settings.image_size, len(known.images)

        def look(method: ByTheClock, seconds: float, crops: int) -> None:
            n_crops = sum(number for number, _ in method.crops)
            fit_whitening(method.trunk, known, machine, settings, work)
            progress = {"epochs": crops / n_crops / n_images, "crops_per_s": crops / seconds}
            tell(
                f"after {moment_after(moments, seconds):g} s",
                {**scores(method.trunk, machine, size, (known, held)), **progress},
            )

        kind = SecondByTheClock if settings.method == V2 else FirstByTheClock
        method = kind(trunk, known, settings, machine, work)
        tell(
            f"untrained {settings.arch}",
            scores(method.trunk, machine, size, (known, held)),
        )
        loop = Loop(method)
        method.begin(moments, look)
        try:
            while True:
                loop.run_epoch()
        except Finished:
            pass


def moment_after(moments: Sequence[float], seconds: float) -> float:
    """Return the moment at which a look was due that was taken after so many seconds."""
    return max(moment for moment in moments if moment <= seconds)


def recipe(text: str) -> tuple[str, dict[str, Any]]:
    """Return name and settings of `NAME: SETTING=VALUE …`."""
    name, _, settings = text.partition(":")
    return name.strip(), dict(map(setting, settings.split()))


def table(rows: Mapping[tuple[str, str], Sequence[ROW]]) -> str:
    """Return mean ± deviation over the seeds, by recipe and moment, as Markdown."""
    n_seeds = max(map(len, rows.values()))
    lines = [f"| recipe | moment | k-NN, {n_seeds} seeds | linear | epochs | crops/s |", "|---|---|---|---|---|---|"]
    for (name, moment), seeds in rows.items():
        cells = [[seed[key] for seed in seeds if key in seed] for key in ("knn", "linear", "epochs", "crops_per_s")]
        scores_2 = [f"{mean(cell):.3f} ± {stdev(cell) if len(cell) > 1 else 0:.3f}" for cell in cells[:2]]
        progress = [f"{mean(cell):.1f}" if cell else "" for cell in cells[2:]]
        lines.append(f"| {' | '.join([name, moment, *scores_2, *progress])} |")
    return "\n".join(lines)


def setting(text: str) -> tuple[str, Any]:
    """Return name and value of `NAME=VALUE`."""
    name, _, value = text.partition("=")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value


def main() -> None:
    """Print a row for each moment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--images", type=int, default=10**9, help="only so many, spread evenly")
    parser.add_argument(
        "--seconds", type=lambda text: [float(part) for part in text.split(",")], default=[60.0, 120.0, 240.0]
    )
    parser.add_argument("--recipe", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--set", type=setting, action="append", default=[], metavar="NAME=VALUE", help="a setting of train")
    parser.add_argument("--narrow", type=int, default=1)
    parser.add_argument("--hold-out", type=int, default=HELD_OUT, metavar="N", help="hold out every Nth image")
    parser.add_argument("--held", type=Path, help="held-out images, instead of every Nth")
    parser.add_argument("--try", dest="tried", type=recipe, action="append", metavar="NAME: SETTING=VALUE …")
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[1])
    options = parser.parse_args()
    rows: dict[tuple[str, str], list[ROW]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        if options.held:
            parts = zip((options.data, options.held), ("known", "held"), strict=True)
            known, held = (
                copied(data, options.images, Path(temporary) / name, cache=Path(temporary) / "cache") for data, name in parts
            )
        else:
            known, held = split(options.data, options.images, Path(temporary), every=options.hold_out)
        for seed in options.seeds:
            for name, own in options.tried or [("recipe", {})]:
                settings = {"recipe": options.recipe, "device": options.device, "seed": seed, **dict(options.set), **own}

                def tell(moment: str, row: ROW, name: str = name, seed: int = seed) -> None:
                    rows.setdefault((name, moment), []).append(row)
                    figures = "  ".join(f"{key} {value:.4g}" for key, value in row.items())
                    print(f"{name}, seed {seed}: {moment:<28}{figures}", flush=True)

                learn((known, held), settings, options.seconds, tell, options.narrow)
    print(table(rows))


if __name__ == "__main__":
    main()
