"""Images to codes on disk. `graincode-extract-codes --help` shows the configuration."""

from __future__ import annotations

from graincode.config.job import job_main

if __name__ == "__main__":  # before the imports below, so that --help answers at once
    raise SystemExit(job_main("extract_codes"))

import logging
from dataclasses import asdict, replace
from functools import partial

import torch
from omegaconf import DictConfig, open_dict
from torch import Tensor
from tqdm import tqdm

from graincode.config.job import build, open_run, resolve_path
from graincode.core.codes import GrainCodes
from graincode.core.errors import check, check_choice
from graincode.core.precision import Precision, products
from graincode.data.augmentation import Augmentation, Views
from graincode.data.codes import FORMAT, CodeBatch, CodeDataset, is_finished, read_report, write_info, write_split
from graincode.data.images import summaries
from graincode.data.loader import in_order
from graincode.distributed import collectives
from graincode.distributed.memory import fitting, peak_bytes
from graincode.evaluation.streams import blank, check_size
from graincode.export import load_export
from graincode.jobs.dry import dry_run
from graincode.tokenizer import DQVAE

log = logging.getLogger(__name__)


def run(cfg: DictConfig) -> float:
    """Write the codes of all splits; returns the mean number of codes per training image (or of the first split)."""
    check("splits", cfg.splits, "one or more, for example [train,val]", len(cfg.splits) > 0)
    augmentation: Augmentation = build(cfg.augmentation)
    augmentation.check_views(cfg.views)
    check("splits", cfg.splits, "train among them, of which views are made", cfg.views == 1 or "train" in cfg.splits)
    check_choice("precision", precision := cfg.precision, Precision)
    cfg.tokenizer_path = str(resolve_path(cfg, "tokenizer_path", "train_tokenizer", "export"))
    hardware, source = build(cfg.hardware), build(cfg.data)
    device = hardware.machine().device
    export = load_export(cfg.tokenizer_path, "tokenizer", device)
    tokenizer: DQVAE = export.module
    if precision == "float32":  # which a run does not name, as those of before it could be chosen
        with open_dict(cfg):
            del cfg.precision

    def tokenize(images: Tensor) -> GrainCodes:
        with products(precision, device.type):
            return tokenizer.tokenize(images, ratios=cfg.ratios, psnr=cfg.psnr)

    one = partial(tokenize, blank(tokenizer))
    if cfg.debug.dry:
        return dry_run(one, {"tokenizer": tokenizer}, "codes of one image", training=False)
    check_size(source, tokenizer)
    size = fitting(cfg.batch_size, peak_bytes(one), device)  # which refuses ratios or a psnr that does not fit
    images = summaries(source, cfg.splits)
    with open_run("extract_codes", cfg, images, tokenizer=export.identity) as run:
        layout = replace(tokenizer.layout, classes=len(source.class_names))
        folder, splits = run.path / "codes", {}

        def check_codes() -> None:
            for split in cfg.splits:
                CodeDataset(folder, split).check_content()

        if (result := run.finished(partial(collectives.on_main, check_codes))) is not None:
            return run.report_finished(result)
        for split in cfg.splits:
            kept = collectives.on_main(partial(is_finished, folder, split, layout, images[split]))
            if not bool(collectives.broadcast_(torch.tensor([float(bool(kept))]))):
                dataset = source.split(split)
                if split == "train" and cfg.views > 1:
                    dataset = Views(dataset, cfg.views, augmentation, cfg.seed)
                mine = collectives.items(len(dataset), size)
                batches = in_order(dataset, size, workers=hardware.workers, shared=True)
                total, hidden = -(-len(mine) // size), not collectives.is_main()
                with tqdm(batches, split, total, unit=" batches", mininterval=1.0, disable=hidden) as bar:
                    codes = (CodeBatch(tokenize(batch.to(device).images), batch.labels) for batch in bar)
                    write_split(folder, split, layout, len(dataset), codes, images[split], mine.start)
            splits[split] = read_report(folder, split)["summary"]
        info = {
            "format": FORMAT,
            "layout": layout.to_config(),
            "class_names": list(source.class_names),
            "tokenizer": export.identity,
            **export.imported,
            "tokenizer_path": cfg.tokenizer_path,
            "ratios": None if cfg.ratios is None else list(cfg.ratios),
            "psnr": cfg.psnr,
            "views": cfg.views,
            **({} if precision == "float32" else {"precision": precision}),
            "augmentation": asdict(augmentation),
            "splits": splits,
        }
        collectives.on_main(lambda: write_info(folder, info))
        chosen = splits.get("train", next(iter(splits.values())))
        log.info("codes: %s, %.2f an image", folder, chosen["mean_length"])
        return run.finish(chosen["mean_length"], metrics=splits)
