"""Names of before, for call sites that have not moved yet."""

from graincode.networks import perceptual
from graincode.networks.perceptual import PerceptualDistance

__all__ = ["LPIPSDistance", "Lite0Distance", "PerceptualDistance"]


def LPIPSDistance(weights=None, device="cpu"):
    return perceptual.LPIPSDistance(weights=weights).to(device)


def Lite0Distance(device="cpu"):
    return perceptual.Lite0Distance().to(device)
