"""BatchNorm over the images of all ranks, on processors too, where torch's own does not run.

Of several ranks with a part of a batch each, outputs and gradients are those of one process with the whole batch. One sum
over the ranks a layer and direction. x: activations (B, C) or (B, C, …) of this rank; C channels.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm
from torch.nn.modules.batchnorm import _BatchNorm

from deepcluster.core.errors import InputError

PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


# Puts the sum over the ranks in the place of a tensor, and returns it.
Reduce = Callable[[Tensor], Tensor]


def synchronise_batch_norms(network: nn.Module, all_reduce: Reduce) -> nn.Module:
    """The network, whose BatchNorm layers take their statistics over all ranks.

    To be called where there are several ranks, once the network is on its device. Weights and buffers are the same
    objects under the same names. On a GPU the layers are torch's `SyncBatchNorm` (or timm's of that kind).

    Args:
        all_reduce: `deepcluster.core.distributed.all_reduce`.

    Raises:
        InputError: a layer derives from BatchNorm in a way that is not known here.
    """
    _check(network)
    if any(weight.is_cuda for weight in network.parameters()):
        if any(_is_timm(module) for module in network.modules()):
            from timm.layers.norm_act import convert_sync_batchnorm

            return convert_sync_batchnorm(network)  # type: ignore[no-any-return, no-untyped-call]
        return nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-any-return]
    return _converted(network, all_reduce)


class SynchronisedBatchNorm(_BatchNorm):
    """BatchNorm whose statistics in training are those of all ranks; else as torch's, with the same names of weights.

    Of activations in bf16 the statistics are float32, and the result bf16. Ranks may have different numbers of rows, and
    none. Children that a layer has are run after it, as timm's norms with an activation do.
    """

    all_reduce: Reduce

    @classmethod
    def of(cls, norm: _BatchNorm, all_reduce: Reduce) -> "SynchronisedBatchNorm":
        """The layer with the settings, weights, buffers and children of a torch or timm layer."""
        layer = cls(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        layer.all_reduce = all_reduce
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            setattr(layer, name, getattr(norm, name))
        for name, child in norm.named_children():
            layer.add_module(name, child)
        return layer.train(norm.training)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"expected activations (B, C, ...), got {tuple(input.shape)}")

    def forward(self, x: Tensor) -> Tensor:
        """The normalised activations, in x's type and layout.

        Raises:
            ValueError: all ranks together have one value a channel, as torch's layers do.
        """
        result = self._synchronised(x) if self.training else super().forward(x)
        for child in self.children():
            result = child(result)
        return result

    def _synchronised(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        kind = torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype
        mean_C, var_C, count = _statistics(x.detach(), kind, self.all_reduce)
        if count <= 1:
            raise ValueError(f"expected more than 1 value a channel when training, got {tuple(x.shape)} on this rank")
        self._track(mean_C, var_C * (count / (count - 1)))
        weight_C, bias_C = (
            given.to(kind) if given is not None else torch.full_like(mean_C, usual)
            for given, usual in ((self.weight, 1), (self.bias, 0))
        )
        return _Normalise.apply(x, weight_C, bias_C, mean_C, var_C, count, self.eps, self.all_reduce)  # type: ignore[no-any-return]

    def _track(self, mean_C: Tensor, var_C: Tensor) -> None:
        """Move the running statistics; by `momentum`, or to the average of all batches where it is None."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        share = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean_C.to(self.running_mean), share)
        self.running_var.lerp_(var_C.to(self.running_var), share)


def _statistics(x: Tensor, kind: torch.dtype, all_reduce: Reduce) -> tuple[Tensor, Tensor, float]:
    """Mean and variance (C,) of the values of a channel on all ranks, of type `kind`; and how many values these are.

    Sums go in float64: the mean's square, taken from that of the values, leaves a relative error in the variance of
    1e-16 (mean / deviation)².
    """
    channels = x.shape[1]
    sums = torch.zeros(2 * channels + 1, dtype=torch.float64, device=x.device)
    if x.numel():
        # Of the ways to get both, the one that is quick (172 µs for 64 x 64 x 16 x 16; var_mean 6,000). It moves two
        # running statistics as well, which are thrown away.
        mean_C, var_C = torch.batch_norm_update_stats(
            x, torch.zeros(channels, dtype=kind, device=x.device), torch.ones(channels, dtype=kind, device=x.device), 0.0
        )
        mean_C, var_C, count = mean_C.double(), var_C.double(), x.numel() // channels
        torch.cat([count * mean_C, count * (var_C + mean_C**2), sums.new_full((1,), count)], out=sums)
    all_reduce(sums)
    mean_C, square_C = sums[:channels] / sums[-1], sums[channels:-1] / sums[-1]
    return mean_C.to(kind), (square_C - mean_C**2).clamp(min=0).to(kind), float(sums[-1])


class _Normalise(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) * weight + bias, where mean and variance depend on the x of all ranks."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_C: Tensor,
        bias_C: Tensor,
        mean_C: Tensor,
        var_C: Tensor,
        count: float,
        eps: float,
        all_reduce: Reduce,
    ) -> Tensor:
        """The normalised activations."""
        ctx.save_for_backward(x, weight_C, mean_C, var_C)
        ctx.count, ctx.eps, ctx.all_reduce = count, eps, all_reduce
        return batch_norm(x, mean_C, var_C, weight_C, bias_C, eps=eps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slopes: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of x, and this rank's part of those of weight and bias.

        With n values a channel on all ranks and x̂ what is normalised, slopes dy (Ioffe and Szegedy, arXiv 1502.03167,
        section 3): dx = weight / deviation (dy - (sum dy + x̂ sum dy x̂) / n), with sums over all ranks.
        """
        x, weight_C, mean_C, var_C = ctx.saved_tensors
        slopes_weight_C, slopes_bias_C = torch.zeros_like(weight_C), torch.zeros_like(weight_C)
        if x.numel():
            # Of this rank: sum dy x̂ and sum dy, as of statistics that are given.
            _, slopes_weight_C, slopes_bias_C = torch.ops.aten.native_batch_norm_backward(
                slopes, x, weight_C, mean_C, var_C, None, None, False, ctx.eps, (False, True, True)
            )
        sums_2C = ctx.all_reduce(torch.stack([slopes_weight_C, slopes_bias_C]))
        scale_C = weight_C / (var_C + ctx.eps).sqrt()
        factor_2C = -scale_C * sums_2C / ctx.count
        slopes_x = batch_norm(x, mean_C, var_C, factor_2C[0], factor_2C[1], eps=ctx.eps)
        return _add_scaled(slopes_x, slopes, scale_C), slopes_weight_C, slopes_bias_C, None, None, None, None, None


def _add_scaled(x: Tensor, added: Tensor, scale_C: Tensor) -> Tensor:
    """x with `added` times the scale of its channel added in its place."""
    if x.dtype == scale_C.dtype:
        return x.addcmul_(added, scale_C.view(-1, *[1] * (added.ndim - 2)))
    # In bf16 addcmul_ would take four times as long.
    nothing_C, one_C = torch.zeros_like(scale_C), torch.ones_like(scale_C)
    return x.add_(batch_norm(added, nothing_C, one_C, scale_C, nothing_C, eps=0.0))


def _is_timm(module: nn.Module) -> bool:
    """Whether it is timm's BatchNorm with dropout and activation."""
    return type(module).__name__ == "BatchNormAct2d" and type(module).__module__.startswith("timm.")


def _check(network: nn.Module) -> None:
    for name, module in network.named_modules():
        known = type(module) in (*PLAIN, nn.SyncBatchNorm, SynchronisedBatchNorm) or _is_timm(module)
        if isinstance(module, _BatchNorm) and not known:
            raise InputError(
                f"the layer {name or 'itself'!r} of this network is a {type(module).__name__}, which derives from BatchNorm "
                "in a way that can't be synchronised over several processes: train on one, or choose another network"
            )


def _converted(module: nn.Module, all_reduce: Reduce) -> nn.Module:
    """The module, or what takes its place; its parts likewise."""
    if type(module) in PLAIN or _is_timm(module):
        return SynchronisedBatchNorm.of(module, all_reduce)  # type: ignore[arg-type]
    for name, child in module.named_children():
        setattr(module, name, _converted(child, all_reduce))
    return module
