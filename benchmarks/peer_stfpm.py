"""anomalib's STFPM on a category folder, run by `stfpm.py` inside anomalib's own environment.

    python peer_stfpm.py CATEGORY_FOLDER WEIGHTS.safetensors --epochs 2 --workers 1

Trains and tests with anomalib's own engine, defaults and loss; only what costs time beside the work
is switched off (images drawn of the results, progress bar, loggers, validation before the end). The
teacher's ImageNet weights come from a file, since no hub is asked. Prints one line of JSON:

* `train_images_per_second`: over the batches of each epoch but its first, so without start-up;
* `test_images_per_second`: the test pass with its metrics (image and pixel AUROC, AUPRO): the rate
  of the batches but the first, taken for all images, plus the seconds that the metrics take;
* `test_loop_images_per_second`, `metrics_seconds`: its two parts;
* `image_auroc`, `pixel_auroc`, `pixel_aupro`, and what was run.

With `--keep FOLDER` it also writes what it learnt (`student.safetensors`) and the test images' maps
as the network gives them (`maps.npy`, in the order of `names.json`), for others to measure: its own
figures are taken after its post-processing, which cuts off at 0 and 1.
"""

# Runs in an environment of its own, which type checkers of ours do not see.
# pyright: reportMissingImports=false

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import timm
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from anomalib.metrics import AUPRO, AUROC, Evaluator
from anomalib.models import Stfpm
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file, save_file


class Stopwatch(Callback):
    """When each batch ended, and how many images it held."""

    def __init__(self) -> None:
        self.train: list[list[tuple[float, int]]] = []
        self.test: list[tuple[float, int]] = []
        self.test_end = 0.0

    def on_train_epoch_start(self, *_) -> None:
        self.train.append([])

    def on_train_batch_end(self, trainer, module, outputs, batch, index) -> None:
        self.train[-1].append((time.perf_counter(), len(batch.image)))

    def on_test_start(self, *_) -> None:
        self.test.clear()

    def on_test_batch_end(self, trainer, module, outputs, batch, index, loader=0) -> None:
        self.test.append((time.perf_counter(), len(batch.image)))

    def on_test_end(self, *_) -> None:
        self.test_end = time.perf_counter()

    def train_rate(self) -> float:
        images = sum(count for epoch in self.train for _, count in epoch[1:])
        seconds = sum(epoch[-1][0] - epoch[0][0] for epoch in self.train if epoch)
        return images / seconds

    def test_loop_rate(self) -> float:
        images = sum(count for _, count in self.test[1:])
        return images / (self.test[-1][0] - self.test[0][0])


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    seed_everything(options.seed, verbose=False)
    with tempfile.TemporaryDirectory() as work, contextlib.redirect_stdout(sys.stderr):
        result = measure(options, Path(work))
    print(json.dumps(result))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="anomalib's STFPM, timed")
    parser.add_argument("folder", type=Path, help="a category in the layout of MVTec AD")
    parser.add_argument("weights", type=Path, help="the teacher, as safetensors with timm's names")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--epochs", type=int)
    length.add_argument("--steps", type=int)
    parser.add_argument("--train-images", type=int, help="only the first ones by name")
    parser.add_argument("--test-images", type=int, help="only the first ones of each kind by name")
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="a folder for the student and its raw maps")
    return parser.parse_args()


def measure(options: argparse.Namespace, work: Path) -> dict[str, float | int | str]:
    read_teacher_from(options.weights)
    stopwatch = Stopwatch()
    evaluator = Evaluator(
        test_metrics=[
            AUROC(fields=["pred_score", "gt_label"], prefix="image_"),
            AUROC(fields=["anomaly_map", "gt_mask"], prefix="pixel_"),
            AUPRO(fields=["anomaly_map", "gt_mask"], prefix="pixel_"),
        ]
    )
    size = (options.image_size, options.image_size)
    model = Stfpm(
        pre_processor=Stfpm.configure_pre_processor(image_size=size),
        evaluator=evaluator,
        visualizer=False,
    )
    data = datamodule(options, work / "data")
    engine = Engine(
        default_root_dir=work / "results",
        max_epochs=options.epochs or -1,
        max_steps=options.steps or -1,
        # Validation only fits the range of the scores, which the metrics need: once, at the end.
        check_val_every_n_epoch=options.epochs or 10**6,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        callbacks=[stopwatch],
    )
    engine.fit(model, datamodule=data)
    if options.steps:
        engine.validate(model, datamodule=data)
    (figures,) = engine.test(model, datamodule=data)
    if options.keep:
        keep(options.keep, model, data)
    images = sum(count for _, count in stopwatch.test)
    metrics_seconds = stopwatch.test_end - stopwatch.test[-1][0]
    loop_rate = stopwatch.test_loop_rate()
    return {
        "train_images_per_second": stopwatch.train_rate(),
        "test_images_per_second": images / (images / loop_rate + metrics_seconds),
        "test_loop_images_per_second": loop_rate,
        "metrics_seconds": metrics_seconds,
        "image_auroc": figures["image_AUROC"],
        "pixel_auroc": figures["pixel_AUROC"],
        "pixel_aupro": figures["pixel_AUPRO"],
        "train_images": len(data.train_data),
        "test_images": images,
        "steps": sum(len(epoch) for epoch in stopwatch.train),
        "batch_size": options.batch_size,
        "workers": options.workers,
        "threads": torch.get_num_threads(),
        "anomalib": version("anomalib"),
        "torch": torch.__version__,
    }


@torch.no_grad()
def keep(folder: Path, model: Stfpm, data: Folder) -> None:
    """Writes the student, and the raw maps of the test images with their names, KIND/FILE."""
    folder.mkdir(parents=True, exist_ok=True)
    network, maps, names = model.model.eval().cpu(), [], []
    for batch in data.test_dataloader():
        image, _ = model.pre_processor.transform(batch.image, batch.gt_mask)
        maps.append(network(image).anomaly_map.squeeze(1).numpy())
        names += ["/".join(Path(path).parts[-2:]) for path in batch.image_path]
    np.save(folder / "maps.npy", np.concatenate(maps))
    (folder / "names.json").write_text(json.dumps(names))
    student = network.student_model.feature_extractor.state_dict()
    save_file(
        {name: value.contiguous() for name, value in student.items()},
        folder / "student.safetensors",
    )


def read_teacher_from(weights: Path) -> None:
    """Makes timm answer a request for pretrained weights with those of the file."""
    create = timm.create_model

    def create_model(name: str, pretrained: bool = False, **options) -> torch.nn.Module:
        model = create(name, pretrained=False, **options)
        if pretrained:
            model.load_state_dict(load_file(weights))
        return model

    timm.create_model = create_model


def datamodule(options: argparse.Namespace, links: Path) -> Folder:
    """The folder's images, or the first ones, through links where some are left out."""
    folder, kinds = options.folder.resolve(), []
    link_first(folder / "train/good", links / "train/good", options.train_images)
    for source in sorted((folder / "test").iterdir()):
        link_first(source, links / "test" / source.name, options.test_images)
        if source.name != "good":
            kinds.append(source.name)
            masks = folder / "ground_truth" / source.name
            link_first(masks, links / "ground_truth" / source.name, options.test_images)
    return Folder(
        name=folder.name,
        root=links,
        normal_dir="train/good",
        normal_test_dir="test/good",
        abnormal_dir=[f"test/{kind}" for kind in kinds],
        mask_dir=[f"ground_truth/{kind}" for kind in kinds],
        train_batch_size=options.batch_size,
        eval_batch_size=options.batch_size,
        num_workers=options.workers,
        val_split_mode="same_as_test",
        seed=options.seed,
    )


def link_first(source: Path, target: Path, count: int | None) -> None:
    target.mkdir(parents=True)
    for path in sorted(source.iterdir())[:count]:
        (target / path.name).symlink_to(path)


if __name__ == "__main__":
    main()
