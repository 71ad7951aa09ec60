"""The methods, by the name that `method.name` gives them."""

from kdad_dist.config import RunConfig
from kdad_dist.methods.base import Method
from kdad_dist.methods.stfpm import Stfpm

METHODS = {"stfpm": Stfpm}


def build_method(config: RunConfig) -> Method:
    """The student with fresh weights beside its teacher, on the CPU.

    Raises:
        ConfigError, WeightsError: the backbone, its layers or its weights are not what they need
            to be.
    """
    return METHODS[config.method.name](config.method, config.seed)
