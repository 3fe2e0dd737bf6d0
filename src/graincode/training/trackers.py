"""Where a run's metrics and pictures go: log.jsonl always, files in pictures/, and one of Accelerate's trackers."""

from __future__ import annotations

import json
import logging
import math
import re
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from PIL import Image
from torch import Tensor

from graincode.core.errors import Damaged, GraincodeError, brief
from graincode.files import file_size, is_number, read_json, replacing, write_json
from graincode.runs.identity import flatten

log = logging.getLogger(__name__)

LogPosition = tuple[int, bool]  # of a line in a log: its step, and whether it is of the evaluation after that


@dataclass(frozen=True)
class LogSettings:
    """What `conf/logging` gives.

    Attributes:
        tracker: Accelerate's name of a tracker; None: log.jsonl alone, and no pictures.
        project, init: its first argument, and others; "{name}" and "{folder}" stand for the run's.
        resume: further arguments where a run goes on; "{id}" stands for the id that the tracker gave the run.
        id: attribute or method of the tracker's own run that holds that id; None: it needs none.
        images: what its `log_images` takes: a (1, 3, H, W) array, a list of images, or one; None: it has none.
        config: whether it is given the run's configuration.
    """

    tracker: Literal["tensorboard", "wandb", "mlflow", "comet_ml", "aim", "clearml", "swanlab", "trackio"] | None = None
    project: str = "graincode"
    init: dict[str, Any] = field(default_factory=dict)
    resume: dict[str, Any] = field(default_factory=dict)
    id: str | None = None
    images: Literal["array", "list", "one"] | None = None
    config: bool = True


class RunLog:
    """Scalars and images of a run in its folder; what follows `step` and, if `evaluated`, its evaluation is dropped."""

    def __init__(
        self, folder: Path, step: int, evaluated: bool, settings: LogSettings, config: Mapping[str, Any] | None = None
    ) -> None:
        self._folder, self._file, self._images = folder, folder / "log.jsonl", settings.images
        before = read_log(folder)
        kept = [line for line in before if _position(line) <= (step, evaluated)]
        with replacing(self._file) as partial:
            partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        self._tracker: GeneralTracker | None = None
        self._sent: LogPosition = (0, False)  # what the tracker has already, from steps that are done again
        self._hook = threading.excepthook
        if settings.tracker is not None:
            threading.excepthook = self._of_thread
            self._start(settings, [_position(line) for line in before], config or {})

    def _start(self, settings: LogSettings, before: list[LogPosition], config: Mapping[str, Any]) -> None:
        name, file = settings.tracker, self._folder / "tracker.json"
        advice = "remove it, and the tracker begins a new record"
        every = read_json(file, {}, advice) if file.exists() else {}
        known = read_json(file, {name: dict}, advice)[name] if name in every else {}
        if known and not (isinstance(sent := known.get("sent"), list) and [*map(type, sent)] == [int, bool]):
            raise Damaged.at(file, f"sent is {sent!r}", advice)
        values = {"{name}": self._folder.name, "{folder}": str(self._folder), "{id}": known.get("id")}
        arguments = {"": settings.project} | settings.init | (settings.resume if known else {})
        filled = {k: values.get(v, v) if isinstance(v, str) else v for k, v in arguments.items()}
        try:
            self._tracker = LOGGER_TYPE_TO_CLASS[name](filled.pop(""), **filled)
            self._tracker.start()
        except Exception as error:  # trackers have errors of their own, as where nobody is logged in
            advice = f"; pip install {name}" if isinstance(error, ImportError) else ""
            raise GraincodeError(f"tracker={name}: expected one that starts ({brief(error)}){advice}") from error
        if known:
            self._sent = max([*before, tuple(known["sent"])])
        elif settings.config:
            plain = {k: v if isinstance(v, str | int | float | None) else str(v) for k, v in flatten(config).items()}
            self._tracker.store_init_configuration(plain)
        found = None if settings.id is None else attrgetter(settings.id)(self._tracker.tracker)
        write_json(file, every | {name: {"id": found() if callable(found) else found, "sent": self._sent}})

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log numbers by name, which begins with a group and "/"."""
        line = {"step": step, **values}
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if _position(line) > self._sent:
            self._track("log", dict(values), step=step)

    def pictures(self, step: int | None, images: Mapping[str, Tensor]) -> None:
        """Keep the newest (3, H, W) uint8 image of each name in `pictures/`, and log it; without a step, only there."""
        for name, image in images.items():
            drawn = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
            with replacing(self._folder / "pictures" / f"{re.sub('[^a-z0-9]+', '_', name.lower())}.png") as partial:
                drawn.save(partial)
            if step is not None and self._images is not None and (step, True) > self._sent:
                forms = {"array": image[None].cpu().numpy(), "list": [drawn], "one": drawn}
                self._track("log_images", {name: forms[self._images]}, step=step)

    def close(self) -> None:
        """Send what the tracker still holds."""
        self._track("finish")
        threading.excepthook = self._hook

    def _of_thread(self, found: threading.ExceptHookArgs) -> None:
        """Leave an error of TensorBoard's thread, which is raised again by the next thing that it does, to `_track`."""
        if type(found.thread).__name__ != "_AsyncWriterThread":
            self._hook(found)

    def _track(self, method: str, *arguments: Any, **options: Any) -> None:
        """Have the tracker do something; after its first error, as where the disk is full, training goes on without."""
        if self._tracker is None:
            return
        try:
            getattr(self._tracker, method)(*arguments, **options)
        except Exception as error:  # of trackers' own kinds
            name, self._tracker = self._tracker.name, None
            log.warning("%s cannot log (%s): the run goes on without it", name, brief(error))


def _position(line: Mapping[str, float]) -> LogPosition:
    return int(line["step"]), any(name.startswith("val/") for name in line)


def _is_metric(value: Any) -> bool:
    return is_number(value, float) or (isinstance(value, float) and not math.isfinite(value))


def read_log(folder: Path) -> list[dict[str, float]]:
    """The lines of a run's log, in order, but for a last one that was cut off, and damaged ones, which are named."""
    file, lines = folder / "log.jsonl", []
    if not file.exists():
        return lines
    try:
        file_size(file)
        texts = file.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise Damaged.at(file, error, "move it away") from None
    for number, text in enumerate(texts, 1):
        with suppress(ValueError, RecursionError):
            line = json.loads(text)
            if isinstance(line, dict) and is_number(line.get("step"), int) and all(map(_is_metric, line.values())):
                lines.append(line)
                continue
        if number < len(texts) or text.endswith(b"\n"):
            log.warning("%s is damaged (line %d holds no metrics of a step): the line is left out", file, number)
    return lines
