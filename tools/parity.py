"""The table of docs/import.md: imported networks against the outputs of their authors' code.

python tools/parity.py            computes and writes it (half a minute on a CPU)
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "import.md"
BEGIN, END = "<!-- begin: tools/parity.py -->", "<!-- end: tools/parity.py -->"
HEAD = """| network | numbers in | features | latent | reconstruction | equal indices | equal grains |
|---|---|---|---|---|---|---|
"""


def table() -> str:
    """Of each network, the largest difference relative to the largest value, and the shares of equal codes."""
    sys.path.insert(0, str(ROOT / "tests"))
    from helpers_parity import NETWORKS, differences, import_golden

    rows = []
    for network in NETWORKS:
        with tempfile.TemporaryDirectory() as folder:
            module = import_golden(network, Path(folder)).module
        for dtype in (torch.float32, torch.float64):  # not the other way: weights are float32
            found = {name: relative for name, (_, relative) in differences(module, network, dtype).items()}
            features = max(value for name, value in found.items() if name.startswith("features"))
            latent = f"{found['latent']:.1e}" if "latent" in found else ""
            grains = f"{1 - found['grains']:.0%}" if "grains" in found else ""
            numbers = f"{features:.1e} | {latent} | {found['reconstruction']:.1e}"
            kind = str(dtype).removeprefix("torch.")
            rows.append(f"| {network} | {kind} | {numbers} | {1 - found['indices']:.0%} | {grains} |\n")
    return HEAD + "".join(rows)


if __name__ == "__main__":
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    print(made := table())
    PAGE.write_text(f"{before}{BEGIN}\n\n{made}\n{END}{after}", encoding="utf-8")
