"""Judges images with the file that `kdad export RUN --format onnx` writes.

Needs onnxruntime, numpy and Pillow, nothing else: python judge.py detector.onnx new/*.png
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

if len(sys.argv) < 3 or Path(sys.argv[1]).suffix != ".onnx":
    sys.exit("usage: python judge.py FILE.onnx IMAGE ...")
if missing := [path for path in sys.argv[1:] if not Path(path).is_file()]:
    sys.exit(f"judge.py: not a file: {', '.join(missing)}")
session = onnxruntime.InferenceSession(sys.argv[1])
facts = session.get_modelmeta().custom_metadata_map
names = [output.name for output in session.get_outputs()]
size, limit, classes = int(facts["image_size"]), facts.get("threshold"), facts.get("classes")
for path in sys.argv[2:]:
    image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    sides = [round(side * size / min(image.size)) for side in image.size]
    width, height = (size, size) if facts["resize"] == "squash" else sides
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    top, left = (height - size) // 2, (width - size) // 2
    square = pixels[top : top + size, left : left + size]
    said = dict(zip(names, session.run(names, {"image": square[None]}), strict=True))
    score = said["pred_score"][0]  # said["anomaly_map"][0] is the map, where the method gives one
    verdict = "unknown" if limit is None else "anomalous" if score > float(limit) else "normal"
    print(path, score, json.loads(classes)[said["pred_label"][0]] if classes else verdict)
