"""What a type checker knows of a program that uses us. Pyright reads this file; nobody runs it."""

# pyright: strict, reportUnnecessaryTypeIgnoreComment=true

from pathlib import Path
from typing import assert_type

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kdad_dist import Detector, Predictions, load

detector = load("runs/mine", ["score.reduce=topk"], device="cpu")
assert_type(detector, Detector)
assert_type(detector.threshold.value, float | None)
assert_type(detector.config.data.image_size, int)

square = np.zeros((8, 8, 3), dtype=np.uint8)
said = detector.predict(["a.png", Path("b.jpg"), Image.open("c.png"), square])
assert_type(said, Predictions)
assert_type(said.pred_score, NDArray[np.float32])
assert_type(said.anomaly_map, NDArray[np.float32] | None)
assert_type(said.reconstruction, NDArray[np.uint8] | None)
assert_type(said.probabilities, NDArray[np.float32] | None)

detector.predict(square)
detector.predict("a.png")
detector.predict(Path("new").glob("*.png"))
detector.predict(3)  # pyright: ignore[reportArgumentType]
detector.predict([None])  # pyright: ignore[reportArgumentType]
detector.predict(np.zeros((8, 8, 3)))  # pyright: ignore[reportArgumentType]
said.pred_score = None  # pyright: ignore[reportAttributeAccessIssue]
load(3)  # pyright: ignore[reportArgumentType]
