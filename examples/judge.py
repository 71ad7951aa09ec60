"""Judges images with the file that `kdad export RUN --format onnx` writes.

Needs onnxruntime, numpy and Pillow, nothing else: python judge.py detector.onnx new/*.png
"""

import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession(sys.argv[1])
facts = session.get_modelmeta().custom_metadata_map
size, limit = int(facts["image_size"]), facts.get("threshold")
for path in sys.argv[2:]:
    image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    sides = [round(side * size / min(image.size)) for side in image.size]
    width, height = (size, size) if facts["resize"] == "squash" else sides
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    top, left = (height - size) // 2, (width - size) // 2
    square = pixels[top : top + size, left : left + size]
    score, *maps = session.run(None, {"image": square[None]})  # maps: where the method gives them
    verdict = "unknown" if limit is None else "anomalous" if score[0] > float(limit) else "normal"
    print(path, score[0], verdict)
