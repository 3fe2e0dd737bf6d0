"""Two routers: by a density of one's own, and from scratch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from graincode.core.errors import check
from graincode.core.layout import CodeLayout
from graincode.export import register
from graincode.tokenizer import Probe, Router, Routing
from graincode.tokenizer.densities import Density


class LaplacianDensity(Density):
    """Mean of |Laplacian of grey| to a power: high where there are edges and texture."""

    def __init__(self, power: float = 1.0) -> None:
        super().__init__()
        self.power = power

    def forward(self, probe: Probe, layout: CodeLayout) -> Tensor:
        grey = probe.images.mean(dim=1, keepdim=True)  # (B, 1, H, W)
        kernel = grey.new_tensor([[0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]
        edges = F.conv2d(F.pad(grey, (1, 1, 1, 1), mode="replicate"), kernel).abs() ** self.power
        return F.avg_pool2d(edges, layout.grains[0])[:, 0]  # (B, H0, W0)


class CheckerRouter(Router):
    """Every other region gets the finest grain, whatever it shows."""

    def forward(self, probe: Probe, ratios=None) -> Routing:
        check("ratios", ratios, "none, as half of the regions are fine", ratios is None)
        rows, columns = self.layout.grids[0]
        is_fine = (torch.arange(rows)[:, None] + torch.arange(columns)) % 2 == 1
        grains = (is_fine.long() * (self.layout.num_grains - 1)).to(probe.images.device)
        grains = grains.expand(len(probe.images), -1, -1)
        return Routing(grains, density=grains.float())


register("my_router.LaplacianDensity", LaplacianDensity)
register("my_router.CheckerRouter", CheckerRouter)
