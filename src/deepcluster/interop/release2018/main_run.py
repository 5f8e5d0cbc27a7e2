"""A run of `main.py`: where it starts, and the files that it leaves, as today's engine trains."""

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from deepcluster.core.errors import InputError, TrainingError
from deepcluster.core.files import load_tensors, save_tensors
from deepcluster.core.text import count_of
from deepcluster.interop.release2018.main_lines import LINE_EVERY, Lines
from deepcluster.interop.release2018_files import add_to_clusters, images_lists, release_checkpoint
from deepcluster.models.weights import take_weights
from deepcluster.run.folder import CHECKPOINT_FORMAT
from deepcluster.training.deepcluster import DeepCluster
from deepcluster.training.loop import Loop, Observer


@dataclass
class Start:
    """Where training starts.

    Attributes:
        epoch: number of epochs that are done.
        path: the checkpoint, empty without one.
        weights: its tensors by name.
        optimizer: its state of the SGD; None if it has none.
    """

    epoch: int
    path: str = ""
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    optimizer: Mapping[str, Any] | None = None

    @classmethod
    def read(cls, options: argparse.Namespace, lines: Lines) -> Self:
        """Read the file of `--resume`: one that `main.py` left, one of the released ones, or our own.

        Raises:
            InputError: it is none of these, or was trained with other options.
        """
        path = options.resume
        if not path or not Path(path).is_file():
            if path:
                lines.line(f"=> no checkpoint found at '{path}'", always=True)
            return cls(options.start_epoch)
        lines.line(f"=> loading checkpoint '{path}'", always=True)
        state = load_tensors(Path(path))
        epoch, optimizer = state.get("epoch"), state.get("optimizer")
        if state.get("format") == CHECKPOINT_FORMAT:
            epoch, optimizer = state["epoch"] - 1, state.get("trunk_optimizer")
        weights = _weights(state, options)
        if not isinstance(epoch, int):
            epoch = options.start_epoch
        lines.line(f"=> loaded checkpoint '{path}' (epoch {epoch})", always=True)
        if optimizer is None:
            text = f"=> '{path}' has no optimizer: its weights are used, and the momentum starts at zero"
            lines.line(text, always=True)
        return cls(epoch, path, weights, optimizer)

    def apply(self, loop: Loop, method: DeepCluster) -> None:
        """Give the loop the weights, the momentum and the number of its first epoch.

        Raises:
            InputError: they are those of another network.
        """
        loop.epoch = self.epoch + 1
        if not self.path:
            return
        take_weights(method.trunk, self.weights, name=self.path)
        if self.optimizer is not None:
            own = method.trunk_optimizer.state_dict()
            own["state"] = self._momenta(method.trunk_optimizer.param_groups[0]["params"])
            method.trunk_optimizer.load_state_dict(own)

    def _momenta(self, weights: Sequence[Tensor]) -> dict[int, Any]:
        """Return the momentum of each weight; the names of weights in old files are the places that they had in memory."""
        try:
            state = (self.optimizer or {})["state"]
            keys = [key for group in (self.optimizer or {})["param_groups"] for key in group["params"]]
            found = {place: state[key]["momentum_buffer"] for place, key in enumerate(keys) if key in state}
            found = {place: value for place, value in found.items() if value is not None}
            fits = len(keys) == len(weights) and all(value.shape == weights[place].shape for place, value in found.items())
        except (KeyError, TypeError, AttributeError, IndexError):
            fits = False
        if not fits:
            raise InputError(f"{self.path}: its optimizer is not the SGD of this network; use a checkpoint of main.py")
        # A fused SGD goes through weight and momentum as they lie in memory: in the same order.
        return {place: {"momentum_buffer": torch.empty_like(weights[place]).copy_(value)} for place, value in found.items()}


def _weights(state: Mapping[str, Any], options: argparse.Namespace) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint.

    Raises:
        InputError: it has none, or those of another network than the options ask for.
    """
    path, own = options.resume, state.get("settings", {})
    found = state.get("state_dict", state.get("trunk"))
    weights = {str(name): value for name, value in found.items() if isinstance(value, Tensor)} if found else {}
    if not weights:
        raise InputError(f"{path} is no checkpoint of main.py: it has no state_dict")
    arch = state.get("arch", own.get("arch", options.arch))
    if arch != options.arch:
        raise InputError(f"{path} holds {arch}, and --arch is {options.arch}: use --arch {arch} or another checkpoint")
    has_sobel = any(name.split(".")[-3:-2] == ["sobel"] for name in weights)
    if has_sobel != options.sobel:
        trained, cure = ("with", "add --sobel") if has_sobel else ("without", "leave out --sobel")
        raise InputError(f"{path} was trained {trained} Sobel filters: {cure}")
    return weights


class Release2018(Observer):
    """Writes the files of 2018 into EXP, and prints the lines of training.

    Args:
        exp: the folder.
        options: the options of `main.py`.
        lines: where lines are printed.
        start: where training starts.

    Attributes:
        has_begun: all is checked, and training begins.
        epochs_done: number of epochs of this process.
    """

    def __init__(self, exp: Path, options: argparse.Namespace, lines: Lines, start: Start) -> None:
        self.exp, self.options, self.lines, self.start = exp, options, lines, start
        self.has_begun, self.epochs_done, self.is_new_log = False, 0, True
        self.epoch_began = self.training_began = self.step_began = time.monotonic()
        self.waited = self.wait_began = 0.0

    def begin(self, loop: Loop) -> None:
        """Load the checkpoint, and make the folder of the kept ones."""
        if not (loop.labelled or loop.epoch > 1):  # Else `torchrun` has restarted this run.
            self.start.apply(loop, _method(loop))
        else:
            self.is_new_log = not (self.exp / "clusters").is_file()
        self.has_begun = True
        if loop.ranks.is_main:
            (self.exp / "checkpoints").mkdir(parents=True, exist_ok=True)
        if loop.loader.unreadable:
            index, reason = min(loop.loader.unreadable.items())
            name = loop.loader.images.source.name(index)
            n_unreadable = count_of(len(loop.loader.unreadable), "image")
            self.lines.alert(f"left out of all clusters: {n_unreadable} that can't be read, such as {name}: {reason}")
        self.epoch_began = time.monotonic()

    def after_clustering(self, loop: Loop) -> None:
        """Print what the clustering did."""
        seconds = loop.work.clock.seconds
        if self.options.clustering == "Kmeans":
            losses = np.array(loop.method.current.inertia_history, dtype=np.float32)
            self.lines.line(f"k-means loss evolution: {losses}")
        name = "k-means" if self.options.clustering == "Kmeans" else "pic"
        self.lines.line(f"{name} time: {seconds['whitening'] + seconds['clustering']:.0f} s")
        self.lines.line("Assign pseudo labels")
        self.training_began = self.step_began = time.monotonic()
        self.waited, self.wait_began = 0.0, loop.loader.wait_seconds

    def before_step(self, loop: Loop, step: int, n_steps: int) -> None:
        """Keep a checkpoint if one is due."""
        number, rest = divmod(n_steps * (loop.epoch - 1) + step, self.options.checkpoints)
        if rest == 0:
            path = self.exp / "checkpoints" / f"checkpoint_{number}.pth.tar"
            self.lines.line(f"Save checkpoint at: {path}")
            self._save(loop, path, loop.epoch)

    def after_step(self, loop: Loop, step: int, n_steps: int, loss: Tensor) -> None:
        """Print time and loss every 200 steps."""
        now, waited = time.monotonic(), loop.loader.wait_seconds - self.wait_began
        if self.options.verbose and step % LINE_EVERY == 0:
            value = float(loop.ranks.sum(loss.detach().cpu().double()))
            loop.losses.settle(loop.where)
            total, count = loop.losses.over_ranks(loop.ranks)
            self.lines.line(
                f"Epoch: [{loop.epoch - 1}][{step}/{n_steps}]\t"
                f"Time: {now - self.step_began:.3f} ({(now - self.training_began) / (step + 1):.3f})\t"
                f"Data: {waited - self.waited:.3f} ({waited / (step + 1):.3f})\t"
                f"Loss: {value:.4f} ({total / max(1, count):.4f})"
            )
        self.step_began, self.waited = now, waited

    def after_epoch(self, loop: Loop, metrics: dict[str, Any]) -> None:
        """Print the results of the epoch, and write the network and its clusters."""
        epoch, assignment = metrics["epoch"], loop.method.current
        history = assignment.inertia_history
        clustering_loss = history[-1] if self.options.clustering == "Kmeans" and history else 0.0
        nmi = metrics["nmi_previous"]
        self.lines.line("")
        self.lines.line(f"###### Epoch [{epoch - 1}] ###### ")
        self.lines.line(f"Time: {time.monotonic() - self.epoch_began:.3f} s")
        self.lines.line(f"Clustering loss: {clustering_loss:.3f} ")
        self.lines.line(f"ConvNet loss: {metrics['loss']:.3f}")
        if nmi is not None:
            self.lines.line(f"NMI against previous assignment: {nmi:.3f}")
        self.lines.line("####################### ")
        self.lines.line("")
        self._save(loop, self.exp / "checkpoint.pth.tar", epoch)
        if loop.ranks.is_main:
            lists = images_lists(assignment.labels_N, assignment.n_clusters)
            add_to_clusters(self.exp / "clusters", lists, new=self.is_new_log)
        self.epochs_done += 1
        self.is_new_log, self.lines.is_final = False, epoch >= self.options.epochs
        self.epoch_began = time.monotonic()

    def _save(self, loop: Loop, path: Path, epoch: int) -> None:
        """Write a checkpoint of 2018 that says that `epoch` epochs are done.

        Raises:
            TrainingError: it can't be written.
        """
        if not loop.ranks.is_main:
            return
        method = _method(loop)
        state = release_checkpoint(method.trunk, method.head, epoch=epoch, optimizer=method.trunk_optimizer.state_dict())
        try:
            save_tensors(path, state)
        except (OSError, RuntimeError) as fault:
            raise TrainingError(f"{path} could not be written ({fault}); the one before is whole") from None


def _method(loop: Loop) -> DeepCluster:
    if not isinstance(loop.method, DeepCluster):
        raise TypeError(f"main.py trains by DeepCluster, not {type(loop.method).__name__}")
    return loop.method
