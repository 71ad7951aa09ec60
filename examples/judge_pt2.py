"""Judges images with the file that `kdad export RUN --format torch` writes.

Needs torch, numpy and Pillow, nothing else: python judge_pt2.py detector.pt2 new/*.png
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

if len(sys.argv) < 3 or Path(sys.argv[1]).suffix != ".pt2":
    sys.exit("usage: python judge_pt2.py FILE.pt2 IMAGE ...")
if missing := [path for path in sys.argv[1:] if not Path(path).is_file()]:
    sys.exit(f"judge_pt2.py: not a file: {', '.join(missing)}")
inside = {"facts.json": ""}  # filled in by torch
program = torch.export.load(sys.argv[1], extra_files=inside).module()
facts = json.loads(inside["facts.json"])
size, limit, classes = int(facts["image_size"]), facts.get("threshold"), facts.get("classes")
for path in sys.argv[2:]:
    image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    sides = [round(side * size / min(image.size)) for side in image.size]
    width, height = (size, size) if facts["resize"] == "squash" else sides
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    top, left = (height - size) // 2, (width - size) // 2
    square = pixels[top : top + size, left : left + size]
    with torch.no_grad():
        said = program(torch.tensor(square)[None])
    score = said["pred_score"].item()  # said["anomaly_map"][0] is the map, where there is one
    verdict = "unknown" if limit is None else "anomalous" if score > float(limit) else "normal"
    print(path, score, json.loads(classes)[said["pred_label"].item()] if classes else verdict)
