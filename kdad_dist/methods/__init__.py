"""The methods, chosen by `method.name` of a configuration."""

from kdad_dist.config import RunConfig
from kdad_dist.config_methods import LoraMaeConfig, MkdConfig, StfpmConfig, VitkdConfig
from kdad_dist.methods.base import Method
from kdad_dist.methods.loramae import LoraMae
from kdad_dist.methods.mkd import Mkd
from kdad_dist.methods.stfpm import Stfpm
from kdad_dist.methods.vitkd import Vitkd


def build_method(config: RunConfig) -> Method:
    """The student with its initial weights beside its teacher, if it has one, on the CPU.

    Raises:
        ConfigError, WeightsError: the network, its layers or its weights are not what they need
            to be.
    """
    match config.method:
        case StfpmConfig() as method:
            return Stfpm(method, config.seed)
        case LoraMaeConfig() as method:
            return LoraMae(method, config.data.image_size, config.seed)
        case MkdConfig() as method:
            return Mkd(method, config.data.image_size, config.seed)
        case VitkdConfig() as method:
            return Vitkd(method, config.data.image_size, config.seed)
