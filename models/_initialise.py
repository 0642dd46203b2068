"""Seeded weights for the demonstration networks.

No network but ``digits`` is trained.  The weights of the others are drawn so that the graph passes
have something to work on: batch normalisation with the initial statistics (mean 0, variance 1,
weight 1, bias 0) would be an identity, and a pass that folded it wrongly would go unnoticed.
"""

import math

import torch
from torch import nn
from torch.nn import init

from models._blocks import ConvBnAct

# The inverse of the standard deviation of a rectified standard normal variable.
_RECTIFIER_GAIN = math.sqrt(2 / (1 - 1 / math.pi))


def initialise(module: nn.Module, seed: int) -> nn.Module:
    """Draw every weight and running statistic of ``module`` from ``seed``; return it in eval mode.

    The draws come from a generator of their own and leave the global random state alone.
    """
    generator = torch.Generator().manual_seed(seed)
    # These end in a sum, which would grow over the depth if each term made up for a rectifier.
    without_activation = {
        part.conv
        for part in module.modules()
        if isinstance(part, ConvBnAct) and isinstance(part.activation, nn.Identity)
    }
    for part in module.modules():
        match part:
            case nn.Conv2d():
                init.kaiming_normal_(part.weight, nonlinearity="linear", generator=generator)
                with torch.no_grad():
                    if part not in without_activation:
                        part.weight.mul_(_RECTIFIER_GAIN)
                    if part.weight.shape[1] > 1:
                        # Rectified inputs have a positive mean.  Filters that passed it on would
                        # make the output almost the same for every image after some layers.
                        part.weight.sub_(part.weight.mean(dim=(1, 2, 3), keepdim=True))
            case nn.ConvTranspose2d() | nn.Linear():
                init.kaiming_normal_(part.weight, nonlinearity="linear", generator=generator)
            case nn.BatchNorm2d(
                running_mean=torch.Tensor() as mean, running_var=torch.Tensor() as variance
            ):
                init.normal_(mean, std=0.1, generator=generator)
                init.uniform_(variance, 0.5, 1.5, generator=generator)
                init.uniform_(part.weight, 0.7, 1.3, generator=generator)
            case nn.LayerNorm():
                init.uniform_(part.weight, 0.7, 1.3, generator=generator)
            case _:  # Bare parameters, such as the class token of a transformer.
                for parameter in part.parameters(recurse=False):
                    init.normal_(parameter, std=0.1, generator=generator)
                continue
        if part.bias is not None:
            init.normal_(part.bias, std=0.1, generator=generator)
    return module.eval()
