"""k-NN accuracy on held-out images, stage by stage, of a run's trunk and of the same trunk untrained.

    python benchmarks/quality.py RUN --train photos/train --val photos/val

Both folders contain class folders. k-NN: 20 neighbours, cosine, votes weighted by exp(cosine / 0.07); centre views.
"""

import argparse
from pathlib import Path

import torch

from deepcluster.data.sources import ImageSource, open_source
from deepcluster.evaluation.knn import knn_accuracy
from deepcluster.interop.loading import load
from deepcluster.run.folder import RunFolder
from deepcluster.run.model import Model


def accuracy(model: Model, stage: str, known: ImageSource, held_out: ImageSource) -> float:
    """Return the k-NN top-1 accuracy on the held-out images, with the known ones as neighbours."""
    rows = []
    for source in (known, held_out):
        features_ND, unreadable = model.features(source, stage=stage)
        if unreadable:
            raise SystemExit(f"{len(unreadable)} images can't be read: {list(unreadable.values())[:3]}")
        rows.append((features_ND, torch.from_numpy(source.labels_N)))
    return knn_accuracy(*rows[0], *rows[1])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--train", required=True)
    parser.add_argument("--val", required=True)
    parser.add_argument("--stages", help="comma-separated; all by default")
    arguments = parser.parse_args()
    known, held_out = open_source(arguments.train), open_source(arguments.val)
    if known.class_names != held_out.class_names:
        raise SystemExit(f"the classes differ: {known.class_names} and {held_out.class_names}")
    trained, untrained = load(arguments.run), load(f"untrained:{arguments.run}")
    print(f"{len(known):,} known, {len(held_out):,} held out, {len(known.class_names)} classes; k-NN top-1, k = 20, cosine")
    print(f"{'stage':<12}{'untrained':>10}{'trained':>10}{'gain':>10}")
    for stage in arguments.stages.split(",") if arguments.stages else trained.trunk.stages:
        before, after = (accuracy(model, stage, known, held_out) for model in (untrained, trained))
        mark = "  (what embed gives)" if stage == trained.trunk.embed_stage else ""
        print(f"{stage:<12}{before:>10.3f}{after:>10.3f}{after - before:>+10.3f}{mark}")
    metrics = RunFolder(Path(arguments.run)).read_metrics()
    nmi = [f"{line['nmi_previous']:.3f}" for line in metrics if line["nmi_previous"] is not None]
    minutes = sum(sum(line["seconds"].values()) for line in metrics) / 60
    print(f"NMI to the previous epoch: {' '.join(nmi)}")
    print(f"{len(metrics)} epochs, {minutes:.1f} minutes of training and clustering")


if __name__ == "__main__":
    main()
