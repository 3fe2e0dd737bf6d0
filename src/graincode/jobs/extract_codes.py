"""Images to codes on disk. `graincode-extract-codes --help` shows the configuration."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from omegaconf import DictConfig
from tqdm import tqdm

from graincode.core.codes import CodeLayout
from graincode.core.errors import GraincodeError
from graincode.data.codes import FORMAT, CodeBatch, write_split
from graincode.data.images import ImageDataset, ImageSource
from graincode.data.loader import in_order
from graincode.engine.config import build, job_main, open_run, resolve_path
from graincode.engine.dry import dry_run
from graincode.export import load_export
from graincode.files import write_json
from graincode.passes import check_image_size
from graincode.tokenizer import DQVAE


def run(cfg: DictConfig) -> float:
    """Write the codes of all splits; gives the mean number of codes per training image (or of the first split)."""
    cfg.tokenizer_path = str(resolve_path(cfg, "tokenizer_path", "train_tokenizer", "export"))
    if not cfg.splits:
        raise GraincodeError("splits=[]: type for example splits=[train,val]")
    hardware = build(cfg.hardware)
    source: ImageSource = build(cfg.data)
    device = hardware.accelerator().device
    export = load_export(cfg.tokenizer_path, "tokenizer", device)
    tokenizer: DQVAE = export.module
    if cfg.debug.dry:
        images = torch.rand(1, 3, *tokenizer.layout.image_size, device=device) * 2 - 1
        call = partial(tokenizer.tokenize, images, cfg.ratios)
        return dry_run(call, {"tokenizer": tokenizer}, "codes of one image", training=False)
    check_image_size(source, tokenizer)
    with open_run("extract_codes", cfg, tokenizer=export.identity) as run:
        if (result := run.result) is not None:
            return run.report_finished(result)
        layout = CodeLayout(**{**tokenizer.layout.to_config(), "classes": len(source.class_names)})
        folder, splits = run.path / "codes", {}
        folder.mkdir(exist_ok=True)
        for split in cfg.splits:
            report = folder / f"{split}.json"
            if not report.is_file():  # a split that an interrupted run finished stays
                dataset = source.split(split)
                batches = _encode(tokenizer, dataset, cfg.ratios, cfg.batch_size, device, hardware.workers)
                write_json(report, write_split(folder, split, layout, len(dataset), batches))
            splits[split] = json.loads(report.read_text())
        info = {
            "format": FORMAT,
            "layout": layout.to_config(),
            "class_names": list(source.class_names),
            "tokenizer": export.identity,
            "tokenizer_path": str(Path(cfg.tokenizer_path).resolve()),
            "ratios": None if cfg.ratios is None else list(cfg.ratios),
            "splits": splits,
        }
        write_json(folder / "codes.json", info)
        chosen = splits.get("train", next(iter(splits.values())))
        return run.finish(chosen["mean_length"], figures=splits)


def _encode(
    tokenizer: DQVAE,
    dataset: ImageDataset,
    ratios: list[float] | None,
    batch_size: int,
    device: torch.device,
    workers: int,
) -> Iterator[CodeBatch]:
    batches = -(-len(dataset) // batch_size)
    for batch in tqdm(
        in_order(dataset, batch_size, workers=workers), dataset.split, batches, unit=" batches", mininterval=1.0
    ):
        yield CodeBatch(tokenizer.tokenize(batch.images.to(device), ratios), batch.labels)


def main() -> None:
    """Console entry."""
    job_main("extract_codes", run)


if __name__ == "__main__":
    main()
