"""Gradient ascent of 64 filters in batches against one at a time, with the same settings and pictures.

    python benchmarks/visualization.py MODEL [--stages conv1,conv5] [--sizes 48,128,224] [--channels 64] [--steps 3]
        [--repeats 3] [--objective fourier] [--device auto] [--precision auto] [--profile] [--quick]

MODEL is a run folder, a checkpoint or `untrained:ARCH`. "features" of a trunk with fully connected layers is left out
at other sizes than its own.

- batch: the filters in batches of the default size (`visualize filters` without --batch-size), which is printed;
- single: the same filters one after the other, as in the published code;
- picture-step: forward and backward pass, parametrisation and update of one picture;
- of the limit: the time of the operations of convolutions and fully connected layers of both passes at the speed of one
  large matrix product of the same precision, over the batch's time;
- --profile: the batch's time by operation.

Seconds are medians of --repeats, in which the variants take turns; ratios are of medians.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from evaluation import medians
from torch.utils.flop_counter import FlopCounterMode

from deepcluster.core.device import Machine
from deepcluster.core.errors import InputError
from deepcluster.interop.loading import loaded
from deepcluster.run.model import Model
from deepcluster.visualization.ascent import Ascent, Responses, Settings, default_batch_size, settings_of
from deepcluster.visualization.options import FilterOptions


def machine_speed(machine: Machine) -> float:
    """Return the operations per second of one large matrix product, in the precision of the network."""
    kind = torch.bfloat16 if machine.precision == "bf16" else torch.float32
    side = 8_192 if machine.device.type == "cuda" else 1_536
    one, other = (torch.ones(side, side, dtype=kind, device=machine.device) for _ in range(2))

    def multiply() -> None:
        torch.mm(one, other)
        synchronise(machine)

    multiply()
    return 2 * side**3 / medians({"product": multiply}, 5)["product"]


def synchronise(machine: Machine) -> None:
    """Wait for the device."""
    if machine.device.type == "cuda":
        torch.cuda.synchronize()


def climb(filters: Responses, settings: Settings, channels: Sequence[int], size: int) -> list[Ascent]:
    """Run the ascents of these filters to the end, `size` at once, and return them."""
    done = []
    for first in range(0, len(channels), size):
        ascent = Ascent(filters, settings, channels[first : first + size])
        for _ in ascent.steps():
            pass
        done.append(ascent)
    synchronise(filters.machine)
    return done


def step_flops(filters: Responses, settings: Settings) -> int:
    """Return the operations of the network in a step of one picture, forward and backward."""
    ascent = Ascent(filters, settings, [0])
    with FlopCounterMode(display=False) as counter:
        next(ascent.steps())
    return int(counter.get_total_flops())


def compare(filters: Responses, settings: Settings, count: int, repeats: int, speed: float, *, profile: bool) -> None:
    """Print one line of the table."""
    channels, size = list(range(min(count, filters.n_channels))), default_batch_size(filters)
    climb(filters, settings, channels[:2], 2)  # warms up
    ways: dict[str, Callable[[], Any]] = {
        "batch": lambda: climb(filters, settings, channels, size),
        "single": lambda: climb(filters, settings, channels, 1),
    }
    seconds = medians(ways, repeats)
    steps = len(channels) * settings.steps
    limit = step_flops(filters, settings) * steps / speed
    print(
        f"  {settings.image_size:>4} px {filters.stage:<9} batch of {min(size, len(channels)):<4}"
        f"{seconds['batch']:>9.3f} s, single {seconds['single']:>9.3f} s: {seconds['single'] / seconds['batch']:>6.2f}×"
        f"{1000 * seconds['batch'] / steps:>9.2f} ms per picture-step, {limit / seconds['batch']:.2f} of the limit",
        flush=True,
    )
    if profile:
        with torch.profiler.profile() as profiler:
            ways["batch"]()
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=14, max_name_column_width=48))


def measure(model: Model, options: argparse.Namespace) -> None:
    """Print the table of all sizes and stages."""
    speed = machine_speed(model.machine)
    print(f"one large matrix product: {speed / 1e9:,.0f} GFLOP/s")
    trunk = model.copy_of_trunk()
    for size in map(int, options.sizes.split(",")) if options.sizes else [model.image_size]:
        for stage in model.stages(options.stages):
            chosen = FilterOptions(objective=options.objective, steps=options.steps, image_size=size)
            settings = settings_of(chosen, model.image_size)
            try:
                filters = Responses(trunk, stage, model.machine, size=size, made_for=model.image_size)
            except InputError as fault:
                print(f"  {size:>4} px {stage:<9} left out: {fault}")
                continue
            compare(filters, settings, options.channels, options.repeats, speed, profile=options.profile)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--stages", default="all")
    parser.add_argument("--sizes", help="sizes of the pictures; by default the model's")
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--objective", default="fourier", choices=("fourier", "published"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"))
    parser.add_argument("--profile", action="store_true", help="print the time of the batch by operation")
    parser.add_argument("--quick", action="store_true", help="small and once: only check that it runs")
    options = parser.parse_args()
    if options.quick:
        options.channels, options.steps, options.repeats = 4, 1, 1
    model = loaded(options.model, device=options.device)
    model = replace(model, machine=Machine.choose(options.device, options.precision))
    print(
        f"{model.trunk.arch} of {options.model}, {options.objective}, {model.machine.describe()}, torch {torch.__version__}"
    )
    print(f"{options.channels} filters, {options.steps} steps, {options.repeats} repeats")
    measure(model, options)


if __name__ == "__main__":
    main()
