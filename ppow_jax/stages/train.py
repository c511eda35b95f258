"""Stage `train`: the training runs of `config.train`, one after the other."""

from ppow_jax.data import texts
from ppow_jax.errors import ConfigError, UserError
from ppow_jax.experiment import Experiment
from ppow_jax.settings import FRESH, Settings
from ppow_jax.stages import features, room
from ppow_jax.training import boards, drafters, loop


def check(settings: Settings) -> None:
    """Keys that do not go together, or that want a package which is missing.

    Raises:
      UserError: naming the key.
    """
    boards.check(settings.log)
    if not settings.chosen():
        raise ConfigError("config.train: found no run, expected at least one for the stage 'train'")
    for name, run in settings.chosen().items():
        temperature = getattr(run.method, "temperature", None)
        if temperature == 0 and settings.respond.temperature > 0:
            raise ConfigError(
                f"config.train.{name}.temperature: found 0, expected above 0, because respond.temperature "
                f"is: greedy acceptance needs greedy text"
            )
        if temperature == 0 and settings.respond.keep_answers:
            raise ConfigError(
                f"config.train.{name}.temperature: found 0, expected above 0, because of "
                "respond.keep_answers: greedy acceptance needs the target's own text"
            )
        if run.start != FRESH and run.start not in settings.train and "/" not in run.start:
            raise ConfigError(
                f"config.train.{name}.start: found {run.start!r}, expected fresh, an earlier run "
                f"({', '.join(settings.train)}) or a directory, with a / in its path"
            )
        if run.method.window > settings.data.length:
            raise ConfigError(
                f"config.train.{name}.window: found {run.method.window}, expected at most data.length "
                f"({settings.data.length})"
            )


def check_target(experiment: Experiment) -> None:
    """Keys that do not fit the target, drafters that runs start from but that cannot be read, a small disk.

    Raises:
      UserError: naming the key or the file.
    """
    for name, run in experiment.settings.chosen().items():
        shape = drafters.shape_of(experiment, name)
        try:
            run.method.check(shape.vocab_size)
        except ConfigError as e:
            raise ConfigError(f"config.train.{name}.{e}") from e
        room.warn_of_training(experiment, name)
    room.require_for_checkpoints(experiment, experiment.settings.chosen())


def run(experiment: Experiment, name: str) -> None:
    """Trains one run."""
    of, count = corpus(experiment), experiment.settings.train[name].texts
    try:
        chosen = texts.some(of, count)
    except UserError as e:
        raise UserError(f"config.train.{name}.{e}") from e
    loop.train(experiment, name, chosen)


def corpus(experiment: Experiment) -> texts.Corpus:
    """The responses as texts, with their features if the settings keep these; what is missing is computed.

    Raises:
      UserError: too few texts, or a feature that does not fit its dtype.
    """
    data = experiment.settings.data
    kept = features.ensure(experiment) if data.cache_features else None
    return texts.corpus(experiment.responses, kept, data)
