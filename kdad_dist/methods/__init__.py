"""The methods, chosen by `method.name` of a configuration."""

from pathlib import Path

from kdad_dist.config.classkd import ClasskdConfig
from kdad_dist.config.methods import LoraMaeConfig, MkdConfig, StfpmConfig, VitkdConfig
from kdad_dist.config.run import RunConfig
from kdad_dist.errors import ConfigError
from kdad_dist.methods.base import Method
from kdad_dist.methods.classkd import Classkd
from kdad_dist.methods.loramae import LoraMae
from kdad_dist.methods.mkd import Mkd
from kdad_dist.methods.stfpm import Stfpm
from kdad_dist.methods.vitkd import Vitkd
from kdad_dist.models.backbone_classifier import KnownClassifier, OpenRun


def no_runs(run: Path) -> KnownClassifier:
    """The `OpenRun` of who opens none."""
    raise ConfigError(f"{run} is a directory", "give a file of weights")


def build_method(config: RunConfig, open_run: OpenRun = no_runs, teacher: bool = True) -> Method:
    """The student with its initial weights beside its teacher, if it has one, on the CPU.

    Args:
        teacher: whether a classifier's is there, of whom its predictions know nothing.

    Raises:
        ConfigError, WeightsError: the network, its layers or its weights are not what they need
            to be.
    """
    match config.method:
        case StfpmConfig() as method:
            return Stfpm(method, config.seed)
        case LoraMaeConfig() as method:
            return LoraMae(method, config.data.network_size, config.seed)
        case MkdConfig() as method:
            return Mkd(method, config.data.network_size, config.seed)
        case VitkdConfig() as method:
            return Vitkd(method, config.data.network_size, config.seed)
        case ClasskdConfig() as method:
            data = config.data
            return Classkd(
                method, data.classes or (), data.network_size, config.seed, open_run, teacher
            )
