"""BatchNorm over the images of all ranks, also on processors, where torch's own SyncBatchNorm does not run.

Outputs and gradients of ranks with a part of a batch each are those of one process with the whole batch. One sum over the
ranks per layer and direction. x: activations (B, C) or (B, C, …) of this rank; C channels.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm
from torch.nn.modules.batchnorm import _BatchNorm

from deepcluster.core.distributed import Ranks
from deepcluster.core.errors import InputError


class SynchronisedBatchNorm(_BatchNorm):
    """BatchNorm whose statistics are those of all ranks during training; in eval mode torch's.

    The statistics of bf16 activations are float32, the result is bf16. Ranks may have different numbers of rows, or none.
    """

    ranks: Ranks

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"expected activations (B, C, ...), got {tuple(input.shape)}")

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised activations, in x's type and memory format.

        Raises:
            ValueError: all ranks together have one value per channel, as torch's layers do.
        """
        result = self._over_ranks(x) if self.training else super().forward(x)
        for child in self.children():  # Dropout and activation of timm's layer.
            result = child(result)
        return result

    def _over_ranks(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        dtype = torch.promote_types(x.dtype, torch.float32)
        # Sums of the values and of their squares in float64: the variance's relative error is 1e-16 (mean / deviation)².
        sums = torch.zeros(2 * x.shape[1] + 1, dtype=torch.float64, device=x.device)
        if x.numel():
            # The fastest way to both (172 µs for 64 x 64 x 16 x 16; var_mean 6,000). The unused running statistics set the
            # precision.
            unused_C = torch.zeros(x.shape[1], dtype=dtype, device=x.device)
            mean_C, var_C = torch.batch_norm_update_stats(x.detach(), unused_C, unused_C.clone(), 0.0)
            mean_C, var_C = mean_C.double(), var_C.double()
            n_values = x.numel() // x.shape[1]
            sums = torch.cat([n_values * mean_C, n_values * (var_C + mean_C.square()), sums.new_full((1,), n_values)])
        count = float(self.ranks.sum(sums)[-1])
        if count <= 1:
            raise ValueError(f"expected more than 1 value per channel when training, got {tuple(x.shape)} on this rank")
        mean_C, square_C = (sums[:-1] / count).chunk(2)
        var_C = (square_C - mean_C.square()).clamp(min=0).to(dtype)
        mean_C = mean_C.to(dtype)
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            share = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean_C.to(self.running_mean), share)
            self.running_var.lerp_((var_C * (count / (count - 1))).to(self.running_var), share)
        weight_C = torch.ones_like(mean_C) if self.weight is None else self.weight.to(dtype)
        bias_C = torch.zeros_like(mean_C) if self.bias is None else self.bias.to(dtype)
        return _Normalise.apply(x, weight_C, bias_C, mean_C, var_C, count, self.eps, self.ranks)  # type: ignore[no-any-return]


class _Normalise(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) * weight + bias, where mean and variance depend on the x of all ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *constants: Any) -> Tensor:
        weight_C, bias_C, mean_C, var_C, ctx.count, ctx.eps, ctx.ranks = constants
        ctx.save_for_backward(x, weight_C, mean_C, var_C)
        return batch_norm(x, mean_C, var_C, weight_C, bias_C, eps=ctx.eps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slopes: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of x, and this rank's part of those of weight and bias.

        With n values per channel on all ranks, slopes dy and x̂ = (x - mean) / deviation (Ioffe and Szegedy, arXiv
        1502.03167, section 3): dx = weight / deviation (dy - (sum dy + x̂ sum dy x̂) / n), with sums over all ranks.
        """
        x, weight_C, mean_C, var_C = ctx.saved_tensors
        none_C = torch.zeros_like(mean_C)
        sums_2C = torch.stack([none_C, none_C])
        if x.numel():
            # This rank's sum dy x̂ and sum dy.
            _, *sums = torch.ops.aten.native_batch_norm_backward(
                slopes, x, weight_C, mean_C, var_C, None, None, False, ctx.eps, (False, True, True)
            )
            sums_2C = torch.stack(sums)
        factor_2C = ctx.ranks.sum(sums_2C.clone()) * (-weight_C / (var_C + ctx.eps).sqrt() / ctx.count)
        slopes_x = batch_norm(x, mean_C, var_C, factor_2C[0], factor_2C[1], eps=ctx.eps)
        slopes_x += batch_norm(slopes, none_C, var_C, weight_C, none_C, eps=ctx.eps)
        return slopes_x, *sums_2C, None, None, None, None, None


def synchronise_batch_norms(network: nn.Module, ranks: Ranks) -> nn.Module:
    """Return the network, whose BatchNorm layers take their statistics over all ranks; as it is on a single process.

    Call it once the network is on its device. Weights and buffers stay the same objects under the same names. On a GPU
    the layers are torch's `SyncBatchNorm`, or timm's of that kind.

    Raises:
        InputError: a layer derives from BatchNorm in an unknown way.
    """
    if ranks.size == 1:
        return network
    norms = {name: module for name, module in network.named_modules() if isinstance(module, _BatchNorm)}
    known = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, SynchronisedBatchNorm)
    timms = [m for m in norms.values() if type(m).__name__ == "BatchNormAct2d" and type(m).__module__.startswith("timm.")]
    for name, module in norms.items():
        if type(module) not in known and module not in timms:
            raise InputError(
                f"the layer {name or 'itself'!r} of this network is a {type(module).__name__}, which derives from BatchNorm "
                "in a way that can't be synchronised over several processes: train on one, or choose another network"
            )
    if not any(weight.is_cuda for weight in network.parameters()):
        for module in norms.values():
            module.__class__, module.ranks = SynchronisedBatchNorm, ranks  # type: ignore[assignment]
        return network
    if timms:  # BatchNorm with dropout and activation.
        from timm.layers.norm_act import convert_sync_batchnorm

        return convert_sync_batchnorm(network)  # type: ignore[no-any-return, no-untyped-call]
    return nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-any-return]
