"""Maker of a run directory as training and scoring leave it, without either."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from sklearn.metrics import auc, roc_curve

FIGURES = ("image_auroc", "image_ap", "image_f1_max", "pixel_auroc", "pixel_ap", "pixel_aupro")
THRESHOLD = 0.35


def make_run(
    run: Path,
    *,
    categories: Sequence[str] = ("tile",),
    defect_types: Sequence[str] = ("crack", "stain"),
    normal: int = 30,
    defective: int = 20,
    name: str = "tile-stfpm",
    scored: bool = True,
    reconstructs: bool = False,
) -> Path:
    """Writes the run directory and returns it; `defective` images of each type."""
    run.mkdir(parents=True, exist_ok=True)
    config = {"name": name, "seed": 0, "data": {"shards": "shards/tile", "category": "all"},
              "method": {"name": "stfpm", "teacher": {"backbone": "resnet18"}}}  # fmt: skip
    (run / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    write_json(run / "environment.json", {
        "python": "3.11.9", "torch": "2.10.0", "platform": "Linux", "cpu": "two cores", "gpu": None,
        "devices": 2, "commit": "0123abcd", "version": "0.1.0", "packages": {"numpy": "2.4.6"},
    })  # fmt: skip
    write_json(run / "status.json", {
        "state": "finished", "step": 400, "steps": 400, "updated": "2026-01-02T03:04:05Z",
        "reason": None,
    })  # fmt: skip
    write_log(run / "metrics.jsonl")
    if scored:
        rows = write_scores(run, categories, defect_types, normal, defective)
        write_examples(run / "scores" / "examples", rows, reconstructs)
    return run


def write_json(path: Path, values: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))


def write_log(path: Path, steps: int = 400) -> None:
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        for step in range(10, steps + 1, 10):
            loss = 1.5 * np.exp(-step / 120) + 0.08 + 0.02 * rng.random()
            line = {"step": step, "samples_seen": step * 8, "epoch": step / 20, "loss": loss}
            line |= {"lr": 0.4, "grad_norm": 1.0, "images_per_second": 20 + rng.random()}
            file.write(json.dumps(line) + "\n")
            if step % 20 == 0:
                line = {"step": step, "epoch": step / 20, "val_loss": loss * 1.1}
                file.write(json.dumps(line) + "\n")


def write_scores(
    run: Path, categories: Sequence[str], defect_types: Sequence[str], normal: int, defective: int
) -> list[tuple]:
    """metrics.json and scores/, with figures that follow from the scores drawn; the scores."""
    rng = np.random.default_rng(1)
    rows, figures, curves = [], {}, {}
    for category in categories:
        drawn = [(f"{category}/good/{i:03}", "", 0, rng.gamma(9, 0.022)) for i in range(normal)]
        for kind, defect in enumerate(defect_types):
            drawn += [
                (f"{category}/{defect}/{i:03}", defect, 1, 0.12 + rng.gamma(4 + 2 * kind, 0.08))
                for i in range(defective)
            ]
        scores = [(key, category, *rest, int(rest[2] > THRESHOLD)) for key, *rest in drawn]
        rows += scores
        curves[category] = make_curves(scores)
        parts = {d: [s for s in scores if s[2] in ("", d)] for d in defect_types}
        figures[category] = make_figures(scores) | {
            "defect_types": {d: make_figures(part) for d, part in parts.items()},
            "notes": {},
        }
    write_json(run / "scores" / "curves.json", curves)
    with (run / "scores" / "scores.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["key", "category", "defect_type", "gt_label", "pred_score", "pred_label"])
        writer.writerows(rows)
    known = {f: [c[f] for c in figures.values() if c[f] is not None] for f in FIGURES}
    mean = {f: float(np.mean(values)) if values else None for f, values in known.items()}
    called = {label: [row[5] for row in rows if row[3] == label] for label in (0, 1)}
    rates = {label: float(np.mean(part)) if part else None for label, part in called.items()}
    write_json(run / "metrics.json", {
        "mean": mean, "categories": figures, "synthetic": None,
        "threshold": {"value": THRESHOLD, "quantile": 0.99, "images": 12, "pixel_value": THRESHOLD,
                      "false_positive_rate": rates[0], "true_positive_rate": rates[1]},
        "provenance": {"fingerprint": "5ca1ab1e" * 8, "checkpoint_step": 340,
                       "checkpoint_rule": "lowest loss on held-out images",
                       "config_digest": "feedbeef", "commit": "0123abcd", "seconds": 93.4,
                       "images_per_second": 61.5, "world_size": 2,
                       "latency_ms": {"median": 41.27, "p95": 55.8, "unit_images": 4}},
    })  # fmt: skip
    return rows


def make_figures(scores: Sequence[tuple]) -> dict[str, Any]:
    labels, values = [s[3] for s in scores], [s[4] for s in scores]
    if len(set(labels)) < 2:
        return dict.fromkeys(FIGURES, None) | {"images": len(scores)}
    fpr, tpr, _ = roc_curve(labels, values)
    area = float(auc(fpr, tpr))
    return {f: round(area ** (1 + i / 4), 4) for i, f in enumerate(FIGURES)} | {
        "images": len(scores)
    }


def make_curves(scores: Sequence[tuple]) -> dict[str, Any]:
    labels = [s[3] for s in scores]
    if len(set(labels)) < 2:
        return {"roc": None, "pixel_roc": None, "pro": None}
    fpr, tpr, _ = roc_curve(labels, [s[4] for s in scores])
    grid = np.linspace(0, 1, 200)
    return {
        "roc": {"fpr": fpr.tolist(), "tpr": tpr.tolist()},
        "pixel_roc": {"fpr": grid.tolist(), "tpr": (grid**0.08).tolist()},
        "pro": {"fpr": grid.tolist(), "pro": (grid**0.15).tolist()},
    }


def write_examples(folder: Path, rows: Sequence[tuple], reconstructs: bool) -> None:
    """A few pictures of each kind, with maps that glow where the defect is."""
    folder.mkdir(parents=True)
    entries: list[dict[str, Any]] = []
    kinds = {(1, 0): "miss", (1, 1): "hit", (0, 1): "false_alarm", (0, 0): "normal"}
    seen: dict[tuple[str, str], int] = {}
    for key, category, defect_type, gt_label, pred_score, pred_label in rows:
        kind = kinds[gt_label, pred_label]
        seen[category, kind] = seen.get((category, kind), 0) + 1
        if seen[category, kind] > 3:
            continue
        stem = f"{len(entries):04}"
        image, mask = surface(len(entries), bool(gt_label))
        Image.fromarray(image).save(folder / f"{stem}_image.png")
        if gt_label:
            Image.fromarray(mask).save(folder / f"{stem}_mask.png")
        if reconstructs:
            Image.fromarray(surface(len(entries), False)[0]).save(
                folder / f"{stem}_reconstruction.png"
            )
        write_map(folder / f"{stem}_map.png", mask, len(entries))
        entries.append({
            "key": key, "category": category, "defect_type": defect_type or None,
            "gt_label": gt_label, "pred_score": pred_score, "pred_label": pred_label, "kind": kind,
            "image": f"{stem}_image.png", "mask": f"{stem}_mask.png" if gt_label else None,
            "reconstruction": f"{stem}_reconstruction.png" if reconstructs else None,
            "map": f"{stem}_map.png", "map_max": pred_score,
        })  # fmt: skip
    write_json(folder / "examples.json", entries)


def write_explained(run: Path, classes: Sequence[str] = ("cat", "dog")) -> None:
    """Maps of three networks, and how far they agree, as scoring a classifier leaves them."""
    folder = run / "scores" / "explained"
    folder.mkdir(parents=True)
    networks, kinds = ("student", "teacher", "beside"), ("gradcam", "gradcam++")
    entries = []
    for number, name in enumerate(classes):
        image, mask = surface(number, True)
        Image.fromarray(image).save(folder / f"{number:04}_image.png")
        maps = {n: {k: f"{number:04}_{n}_{k}.png" for k in kinds} for n in networks}
        for files in maps.values():
            for file in files.values():
                write_map(folder / file, mask, number)
        told = {"student": name, "teacher": name, "beside": classes[0]}
        entries.append({"key": f"test/{name}/0", "class_name": name, "told": told, "maps": maps,
                        "image": f"{number:04}_image.png"})  # fmt: skip
    write_json(folder / "explained.json", entries)
    metrics = json.loads((run / "metrics.json").read_text())
    agreed = {"correlation": 0.876, "overlap": 0.543, "images": 48, "without": 2}
    nothing = {"correlation": None, "overlap": None, "images": 0, "without": 50}
    pairs = {"student_teacher": agreed, "student_beside": agreed, "teacher_beside": nothing}
    write_json(run / "metrics.json", metrics | {"agreement": dict.fromkeys(kinds, pairs)})


def surface(
    seed: int, defective: bool, side: int = 64
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """A grained surface, with a dark stain where asked, and the stain's mask."""
    rng = np.random.default_rng(seed)
    grain = rng.normal(0, 14, (side, side, 1)) + 12 * np.sin(np.arange(side) / 5)[:, None, None]
    image = np.array([150, 140, 125]) + grain
    y, x = np.mgrid[:side, :side]
    cy, cx, radius = rng.integers(16, 48), rng.integers(16, 48), rng.integers(4, 9)
    mask = ((y - cy) ** 2 + (x - cx) ** 2 < radius**2) & defective
    image[mask] -= 60
    return image.clip(0, 255).astype(np.uint8), mask.astype(np.uint8) * 255


def write_map(path: Path, mask: NDArray[np.uint8], seed: int) -> None:
    """A 16-bit map: the mask blurred, over blurred noise, with its peak at 65535."""
    noise = np.random.default_rng(seed).integers(0, 90, mask.shape, dtype=np.uint8)
    glow = Image.fromarray(np.maximum(mask, noise)).filter(ImageFilter.GaussianBlur(4))
    values = np.asarray(glow, dtype=np.float64)
    Image.fromarray((values / values.max() * 65535).astype(np.uint16)).save(path)
