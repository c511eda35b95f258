"""Stage `cst`, the control: continued supervised training.

As many steps as ppow, on the same texts in the same order, from the same checkpoint, with the
supervised objective.
"""

from ppow_jax.experiment import Experiment
from ppow_jax.stages import curves, supervise, training


def run(experiment: Experiment) -> None:
    """Trains the supervised drafter on."""
    settings, ppow = experiment.settings.cst, experiment.settings.ppow
    corpus = training.corpus(experiment)
    optimizer = training.make_optimizer(settings.optimizer, ppow.steps)
    start, _ = training.load_drafter(experiment, "supervise")
    training.train(
        experiment,
        "cst",
        training.place(experiment, start, optimizer),
        corpus,
        ppow.steps,
        ppow.batch_size,
        "continue",
        supervise.stepper(experiment, "cst", optimizer, settings.anchors),
        curves.acceptance(experiment, corpus),
    )
