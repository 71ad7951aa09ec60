"""Every method at its smallest, as a configuration: for tests that hold for each of them."""

from typing import Any

METHODS: dict[str, dict[str, Any]] = {
    "stfpm": {"teacher": {"backbone": "resnet10t", "weights": "random", "layers": [1, 2]}},
    "loramae": {
        "preset": "mae_vit_tiny_patch8",
        "weights": "random",
        "freeze_random": True,
        "lora": {"dropout": 0.2},
    },
    "mkd": {
        "teacher": {"backbone": "test_resnet", "weights": "random", "layers": [1, 2, 3]},
        "pool": False,
        "value_weight": 1.0,
        "balance": True,
        "localise": "smoothgrad",
        "noise_copies": 2,
    },
    "vitkd": {
        "teacher": {"backbone": "test_vit", "weights": "random", "layers": [1, 2, 3]},
        "student": {"heads": 4, "mlp": 32, "dropout": 0.2},
    },
    "classkd": {  # without the teacher that it needs, and its classes
        "network": {"backbone": "test_resnet", "weights": "random", "head": "original"},
        "distill": "rkd_distance",
        "relation_weight": 1.0,
    },
}
"""Of every method there is; whoever adds one adds it here, and it is held to what all hold to."""
CLASSES = ["red", "green", "blue"]
FIND_ANOMALIES = [method for method in METHODS if method != "classkd"]
"""The others learn from labels."""


def tiny(method: str, /, **sections: dict[str, Any]) -> dict[str, Any]:
    """A configuration of a training that takes seconds, its sections changed by those given; what
    `configured` still lacks are the shards.
    """
    config = {
        "data": {"image_size": 32, "val_fraction": 0.2},
        "method": METHODS[method],
        "optim": {"name": "sgd", "lr": 0.01},
        "train": {"steps": 6, "batch_size": 6, "log_every": 1, "check_every": 2},
    }
    for name, section in sections.items():
        config[name] = {**config.get(name, {}), **section}
    config["method"] = {"name": method, **config["method"]}
    return {"name": method, **config}
