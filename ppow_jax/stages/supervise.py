"""Stage `supervise`: EAGLE-3's training-time test, from fresh parameters or those of a drafter's files.

Every sampled anchor is stepped through a window of the text itself, feeding on its own hidden states;
step j's loss is the cross-entropy to the target's law, weighted decay ** j.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from ppow_jax import adaw, objective, partition, teacher, windows
from ppow_jax.console import log
from ppow_jax.data import texts
from ppow_jax.experiment import Experiment
from ppow_jax.models import induction
from ppow_jax.models.drafter import Drafter, DrafterWeights, weights_of
from ppow_jax.models.layers import likeliest
from ppow_jax.models.target import Target, draft_head, head_matrix
from ppow_jax.stages import curves, training
from ppow_jax.stages.training import Batch, State

_INDUCTION_TEXTS, _INDUCTION_BATCH = 256, 16  # what the relation of features to tokens is read from


def run(experiment: Experiment) -> None:
    """Trains a drafter from scratch, or on from files."""
    settings = experiment.settings.supervise
    corpus = training.corpus(experiment)
    optimizer = training.make_optimizer(settings.optimizer, settings.steps)
    training.train(
        experiment,
        "supervise",
        _first_state(experiment, corpus, optimizer),
        corpus,
        settings.steps,
        settings.batch_size,
        "supervise",
        stepper(experiment, "supervise", optimizer, settings.anchors),
        curves.acceptance(experiment, corpus),
    )


def _first_state(
    experiment: Experiment, corpus: training.Corpus, optimizer: optax.GradientTransformation
) -> State:
    """What the stage begins with."""
    if experiment.settings.drafter.path:
        return training.place(experiment, training.load_drafter(experiment, "imported")[0], optimizer)
    size, V = experiment.settings.drafter.vocab_size, experiment.target.config.vocab_size
    vocab, coverage = texts.draft_vocabulary(experiment.responses, corpus.indices, size, V)
    log.info("supervise: %d texts; draft vocabulary %d covers %.4f", len(corpus.train), size, coverage)
    return fresh_state(experiment, corpus, optimizer, vocab)


def fresh_state(
    experiment: Experiment,
    corpus: training.Corpus,
    optimizer: optax.GradientTransformation,
    vocab: np.ndarray,
) -> State:
    """A new drafter, with induction heads if the settings say so, and its optimiser."""
    state = training.fresh_state(experiment, optimizer, vocab)
    store = training.checkpoints(experiment, "supervise")
    resumes = store.latest is not None  # then the state is no more than a template
    store.close()
    if resumes or not experiment.settings.drafter.induction:
        return state
    head = head_matrix(experiment.target.config, experiment.target_params)
    embedding = weights_of(state["params"], experiment.target_params, vocab).embedding
    drafter = training.drafter_of(experiment)
    params = induction.begin(drafter, state["params"], embedding, head, _for_induction(experiment, corpus))
    return state | {"params": partition.shard(params, experiment.mesh)}


def _for_induction(
    experiment: Experiment, corpus: training.Corpus
) -> Iterator[tuple[jax.Array, jax.Array, jax.Array]]:
    """Taps `[B, T, C]`, tokens `[B, T]` and where there is text, bool `[B, T]`, of evenly spread texts."""
    chosen = training.spread(len(corpus.train), _INDUCTION_TEXTS)
    for at in range(0, len(chosen), _INDUCTION_BATCH):
        batch = training.stack(experiment, [corpus.train[i] for i in chosen[at : at + _INDUCTION_BATCH]])
        real = jax.lax.cummax(batch["assistant"].astype(jnp.int32), axis=1, reverse=True) > 0
        yield training.taps_of(experiment, batch), batch["tokens"], real


def stepper(
    experiment: Experiment,
    stage: str,
    optimizer: optax.GradientTransformation,
    anchors: int,
) -> training.Step:
    """The jitted supervised step."""
    settings = experiment.settings.supervise
    key = experiment.key(stage)
    update = make_update(
        experiment.target,
        training.drafter_of(experiment),
        optimizer,
        anchors,
        settings.window,
        settings.decay,
        experiment.mesh,
        settings.accumulate,
        experiment.settings.drafter.remat,
    )

    def step(number: int, state: State, batch: Batch) -> tuple[State, Mapping[str, Any]]:
        learner, vocab = training.split(state)
        here = jax.random.fold_in(key, number)
        learner, metrics = update(learner, vocab, experiment.target_params, batch, here)
        return state | learner, metrics

    return step


def make_update(
    target: Target,
    drafter: Drafter,
    optimizer: optax.GradientTransformation,
    anchors: int,
    window: int,
    decay: float,
    mesh: Mesh | None = None,
    accumulate: int = 1,
    remat: str = "none",
) -> Callable[..., tuple[State, dict[str, jax.Array]]]:
    """(learner, vocab, target parameters, batch, key) -> (learner, metrics); learner donated.

    With a mesh the learner keeps the layout of `partition.TABLE`. `accumulate`: the parts of the batch that
    the gradient is added up from; `remat`: see `windows.window_pass`.
    """

    @functools.partial(jax.jit, donate_argnums=0)
    def update(learner: State, vocab: jax.Array, target_params: dict, batch: Batch, key: jax.Array):
        lesson = teacher.lesson_of(target, target_params, batch)
        mask_BxT = windows.anchor_mask(batch["assistant"])
        anchors_BxA, real_BxA = adaw.sample_anchors(key, mask_BxT.astype(jnp.float32), anchors)
        head = draft_head(target.config, target_params, vocab)

        whole = (batch, anchors_BxA, real_BxA)
        counts_K = jnp.stack([_valid(*whole, step).sum() for step in range(window)])

        def loss_of(params: dict, *rows: Any):
            weights = weights_of(params, target_params, vocab)
            return supervised_loss(drafter, weights, head, *rows, counts_K, decay, remat)

        rows = (lesson, *whole)
        (loss, metrics), grads = training.gradient(loss_of, learner["params"], accumulate, *rows)
        updates, opt_state = optimizer.update(grads, learner["opt_state"], learner["params"])
        params = optax.apply_updates(learner["params"], updates)
        metrics |= {"loss": loss, "grad_norm": optax.global_norm(grads)}
        return partition.hold({"params": params, "opt_state": opt_state}, mesh), metrics

    return update


def supervised_loss(
    drafter: Drafter,
    weights: DrafterWeights,
    head_NxD: jax.Array,
    lesson: teacher.Lesson,
    batch: Batch,
    anchors_BxA: jax.Array,
    real_BxA: jax.Array,
    counts_K: jax.Array,
    decay: float,
    remat: str = "none",
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Training-time-test loss over the given anchors (EAGLE-3, section 3.2).

    Args:
      drafter, weights, head_NxD, lesson, batch, anchors_BxA, real_BxA: a batch, or a part of one.
      counts_K: valid anchors of each step in the whole batch; as many as the steps of a window.
      decay, remat: as in the settings.

    Returns:
      sum over j of decay ** j times the mean cross-entropy of step j, and the accuracy of each step
      against the text; of a part of a batch, its share in both.
    """
    tokens_BxT, window = batch["tokens"], len(counts_K)
    prefix = windows.text_prefix(drafter, weights, lesson.taps, tokens_BxT)
    start = windows.text_starts(prefix, tokens_BxT, anchors_BxA)

    def given(step: int):
        valid = _valid(batch, anchors_BxA, real_BxA, step)
        token = windows.text_ahead(tokens_BxT, anchors_BxA, step)
        return token, _at(lesson.hidden, anchors_BxA + step + 1), valid[..., None]

    def choose(step: int, logits_BxLx1xN: jax.Array, told: tuple[jax.Array, ...]):
        token, law_BxLxD, valid = told
        loss = objective.cross_entropy((law_BxLxD @ head_NxD.T)[:, :, None], logits_BxLx1xN)
        hit = weights.vocab[likeliest(logits_BxLx1xN)] == token
        return token, (loss, hit.astype(jnp.float32), valid)

    loss, hit, valid = windows.window_pass(
        drafter, weights, prefix.keys_values, start, choose, window, given, remat
    )
    mean = jax.vmap(objective.masked_mean, in_axes=(-1, -1, 0))
    accuracy_K = mean(hit, valid, counts_K)
    total = jnp.sum(mean(loss, valid, counts_K) * decay ** jnp.arange(window))
    return total, {f"accuracy_{j}": accuracy_K[j] for j in range(window)}


def _at(values_BxT: jax.Array, positions_BxA: jax.Array) -> jax.Array:
    """Values `[B, A, ...]` at positions, or at the last one where these lie beyond."""
    where = jnp.minimum(positions_BxA, values_BxT.shape[1] - 1)
    return jnp.take_along_axis(values_BxT, where.reshape(*where.shape, *[1] * (values_BxT.ndim - 2)), 1)


def _valid(batch: Batch, anchors_BxA: jax.Array, real_BxA: jax.Array, step: int) -> jax.Array:
    """bool `[B, A]`: the anchors whose window has the target's own token at a step."""
    ahead = anchors_BxA + step + 2
    return real_BxA & (ahead < batch["tokens"].shape[1]) & _at(batch["assistant"], ahead)
