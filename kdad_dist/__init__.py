"""Train, score and report visual anomaly detectors on any number of GPUs."""

__version__ = "0.1.0"
