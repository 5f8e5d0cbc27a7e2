"""Speed of a run against its limit: the same network on random tensors, same precision, same batch.

    python benchmarks/limit.py RUN [--repeats 7]

Prints images per second of the run's epochs after the first, for the feature pass (if the run has one) and for
training (for DeepCluster-v2 an image is all its crops), next to the bare network; and the run's peak memory. Use an
idle machine for both.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bare_network import BareNetwork

from deepcluster.core.device import Machine
from deepcluster.core.text import size
from deepcluster.run.features import extract_stage
from deepcluster.run.folder import RunFolder
from deepcluster.run.settings import Settings


def rate(work: Callable[[], object], images: int, machine: Machine, repeats: int) -> float:
    """Return the images per second, the median of several repeats after a warm-up."""
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        work()
        if machine.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return images / statistics.median(seconds[1:])


def bare_rates(settings: Settings, machine: Machine, repeats: int) -> dict[str, float]:
    """Return the images per second of the bare network, by step."""
    network, batch = BareNetwork(settings, machine), settings.batch_size
    raw_BCHW = torch.randint(256, (batch, 3, settings.image_size, settings.image_size), dtype=torch.uint8)
    network.trunk.eval()
    with torch.no_grad():
        features = rate(
            lambda: extract_stage(network.trunk, machine, raw_BCHW, settings.cluster_stage), batch, machine, repeats
        )
    return {"features": features, "training": rate(lambda: network.train_step(batch), batch, machine, repeats)}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    folder = RunFolder(arguments.run)
    config, metrics = folder.read_config(), folder.read_metrics()
    settings = Settings.from_saved(config["settings"])
    machine = Machine.choose(settings.device, settings.precision)
    limit = bare_rates(settings, machine, arguments.repeats)
    print(f"{settings.arch} at {settings.image_size} px, batch {settings.batch_size}, {machine.describe()}")
    print(f"{'images per second':<20}{'run':>10}{'limit':>10}{'share':>8}")
    for step in ("features", "training"):
        rates = [
            config["data"]["images"] / line["seconds"][step] for line in metrics[1:] or metrics if line["seconds"][step]
        ]
        if not rates:  # The run has no feature pass.
            continue
        print(
            f"{step:<20}{statistics.median(rates):>10.1f}{limit[step]:>10.1f}{statistics.median(rates) / limit[step]:>8.0%}"
        )
    for step in ("whitening", "clustering"):
        print(f"{step}: {statistics.median(line['seconds'][step] for line in metrics):.1f} s per epoch")
    print(f"peak memory of the run: {size(max(line['peak_memory_bytes'] for line in metrics))}")


if __name__ == "__main__":
    main()
