"""Where a run's figures and pictures go: a JSON-lines file always; TensorBoard, Weights & Biases and, with either of
them, picture files if configured."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from graincode.core.errors import GraincodeError
from graincode.files import replacing, short_hash

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LogSettings:
    """What `conf/logging` gives.

    Attributes:
        tensorboard: whether to write TensorBoard events beside log.jsonl.
        wandb_project: project of Weights & Biases to log to, too; None logs to none.
    """

    tensorboard: bool = True
    wandb_project: str | None = None


class RunLog:
    """Scalars and images of one run.

    Args:
        folder: of the run.
        step: steps done before; lines of later ones, left by an interrupted run, are dropped.
        evaluated: whether the evaluation after that step, if any, is done; if not, its line is dropped too.
        settings: what to write besides log.jsonl.
        config: of the run, for Weights & Biases.
    Raises:
        GraincodeError: Weights & Biases is asked for and not installed.
    """

    def __init__(
        self,
        folder: Path,
        step: int,
        evaluated: bool,
        settings: LogSettings,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self._file = folder / "log.jsonl"
        kept = [
            line
            for line in read_log(folder)
            if line["step"] < step or (line["step"] == step and (evaluated or not _is_evaluation(line)))
        ]
        with replacing(self._file) as partial:
            partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._writer = self._wandb = None
        if settings.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(folder / "tensorboard", purge_step=step + 1)
        if settings.wandb_project is not None:
            try:
                import wandb
            except ImportError:
                raise GraincodeError("logging=wandb, but wandb is missing: type pip install graincode[wandb]") from None
            self._wandb = wandb.init(
                project=settings.wandb_project, name=folder.name, id=short_hash(str(folder.resolve())), resume="allow",
                dir=str(folder), config=dict(config or {}),
            )  # fmt: skip

    @property
    def shows_images(self) -> bool:
        """Whether images go anywhere."""
        return self._writer is not None or self._wandb is not None

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log numbers by name; a name's part before "/" groups it in TensorBoard."""
        with self._file.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)

    def image(self, step: int | None, name: str, image: Tensor) -> None:
        """Log a (3, H, W) uint8 image, and keep the newest of each name in `pictures/`; without a step, only there."""
        file = self._file.parent / "pictures" / f"{re.sub('[^a-z0-9]+', '_', name.lower())}.png"
        with replacing(file) as partial:
            Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).save(partial)
        if step is None:
            return
        if self._writer is not None:
            self._writer.add_image(name, image, step)
        if self._wandb is not None:
            import wandb

            self._wandb.log({name: wandb.Image(image.permute(1, 2, 0).numpy())}, step=step)

    def close(self) -> None:
        """Flush what is buffered."""
        if self._writer is not None:
            self._writer.close()
        if self._wandb is not None:
            self._wandb.finish()


def _is_evaluation(line: Mapping[str, float]) -> bool:
    return any(name.startswith("val/") for name in line)


def read_log(folder: Path) -> list[dict[str, float]]:
    """The lines of a run's log, in order; a last line that was cut off is left out."""
    file, lines = folder / "log.jsonl", []
    for line in file.read_text().splitlines() if file.is_file() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines
