"""Which engine a launch asks for."""

from kdad_dist.config.run import RunConfig
from kdad_dist.methods.base import Method
from kdad_dist.models.norm import convert_batchnorm
from kdad_dist.runtime import launch
from kdad_dist.runtime.engine import Engine, Native
from kdad_dist.runtime.session import Session


def build_engine(config: RunConfig, method: Method, here: Session) -> Engine:
    """The engine of the launch's mode; `method.student` becomes what it wraps.

    Raises:
        UsageError: the student would not be shared between the processes.
    """
    if here.world > 1:
        convert_batchnorm(method.student)
    if here.mode.startswith("zero"):
        from kdad_dist.runtime.zero import Zero  # DeepSpeed need not be installed

        engine: Engine = Zero(config, method, here)
    else:
        engine = Native(config, method, here)
    launch.check_wrapper(engine.student, here.world, here.mode)
    method.student = engine.student
    return engine
