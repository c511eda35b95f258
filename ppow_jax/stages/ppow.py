"""Stage `ppow`: reinforcement of whole windows (PPOW, arXiv 2605.14978).

One step: pick anchors (ADAW), roll out G windows from each, let the target verify them, turn rewards
into group-relative advantages, update. Each phase is one jitted function.

Shape letters: B texts, T positions, A anchors, G windows a group, K window, N draft vocabulary.
"""

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from ppow_jax import adaw, advantages, objective, partition, processes, teacher, windows
from ppow_jax.console import log
from ppow_jax.data import records
from ppow_jax.decode.cost import measure_gamma
from ppow_jax.experiment import Experiment
from ppow_jax.models.drafter import Drafter, weights_of
from ppow_jax.models.target import Target, draft_head
from ppow_jax.rollout import Rollout, drafted_as_one, make_rollout
from ppow_jax.settings import PPOWSettings
from ppow_jax.stages import curves, training
from ppow_jax.stages.training import Batch, State
from ppow_jax.verification import Verdict, make_verify


def run(experiment: Experiment) -> None:
    """Improves the supervised drafter by reinforcement."""
    settings = experiment.settings.ppow
    corpus = training.corpus(experiment)
    optimizer = training.make_optimizer(settings.optimizer, settings.steps * settings.updates)
    start, _ = training.load_drafter(experiment, "supervise")
    state = training.place(experiment, start, optimizer)
    state |= blank_scores(experiment, corpus.records)
    training.train(
        experiment,
        "ppow",
        state,
        corpus,
        settings.steps,
        settings.batch_size,
        "continue",
        stepper(experiment, optimizer, gamma_of(experiment)),
        curves.acceptance(experiment, corpus),
    )


def blank_scores(experiment: Experiment, texts: int) -> State:
    """ADAW's table before anything is scored: float32 `[texts, T]` scores, int32 `[texts]` steps."""
    table = {
        "scores": np.zeros((texts, experiment.settings.data.length), np.float32),
        "scored_at": np.full(texts, -(2**30), np.int32),
    }
    return jax.tree.map(lambda x: partition.put(x, partition.replicated(experiment.mesh)), table)


def gamma_of(experiment: Experiment) -> float:
    """gamma as given, or measured once for a workdir."""
    given = experiment.settings.ppow.gamma
    if given != "measured":
        return float(given)
    path = experiment.workdir / "gamma.json"
    known = records.read_json(path)
    if known is None:
        drafter, _ = training.load_drafter(experiment, "supervise")
        weights = weights_of(drafter["params"], experiment.target_params, drafter["vocab"])
        module = training.drafter_of(experiment)
        gamma = measure_gamma(experiment.target, experiment.target_params, module, weights)
        known = {"gamma": processes.agreed(gamma)}
        records.write_json(path, known)
    log.info("ppow: gamma measured on this machine: %.4f", known["gamma"])
    return known["gamma"]


def stepper(experiment: Experiment, optimizer: optax.GradientTransformation, gamma: float) -> training.Step:
    """One PPOW step: four jitted phases, timed."""
    settings = experiment.settings.ppow
    target, drafter = experiment.target, training.drafter_of(experiment)
    pick = make_pick(target, drafter, settings)
    roll = make_rollout(target, drafter, settings)
    verify = make_verify(target, settings, gamma, experiment.tokenizer.stop_ids)
    remat = experiment.settings.drafter.remat
    update = make_update(target, drafter, optimizer, settings, experiment.mesh, remat)
    key = experiment.key("ppow")
    target_params = experiment.target_params

    def step(number: int, state: State, batch: Batch) -> tuple[State, Mapping[str, Any]]:
        keys = jax.random.split(jax.random.fold_in(key, number), 3)
        clock = [time.monotonic()]

        def lap(value: Any) -> Any:
            jax.block_until_ready(value)
            clock.append(time.monotonic())
            return value

        table, anchors, real = lap(pick(state, target_params, batch, number, keys[0]))
        state = state | table
        learner, vocab = training.split(state)
        rollout = lap(roll(learner["params"], vocab, target_params, batch, anchors, real, keys[1]))
        verdict = lap(verify(target_params, batch, rollout, keys[2]))
        learner, metrics = lap(update(learner, vocab, target_params, batch, rollout, verdict))
        spent = np.diff(clock) / (clock[-1] - clock[0])
        names = ("share_anchors", "share_rollout", "share_verification", "share_update")
        return state | learner, metrics | dict(zip(names, spent.round(4), strict=True))

    return step


def make_pick(target: Target, drafter: Drafter, settings: PPOWSettings) -> Callable[..., tuple]:
    """(state, target parameters, batch, step, key) -> (ADAW table, anchors `[B, A]`, real `[B, A]`)."""
    adaptive = settings.adaw

    @jax.jit
    def pick(state: State, target_params: dict, batch: Batch, number: int, key: jax.Array):
        mask = windows.anchor_mask(batch["assistant"])
        weight, table = mask.astype(jnp.float32), {}
        if adaptive.enabled:
            index = batch["index"]
            active = number > adaptive.warmup_steps
            stale = number - state["scored_at"][index] > adaptive.rescore_every
            known = state["scores"][index]

            def rescore() -> jax.Array:
                fresh = criticality(target, drafter, state, target_params, batch, settings.window)
                return jnp.where(stale[:, None], fresh, known)

            scores = jax.lax.cond(active & stale.any(), rescore, lambda: known)
            at = jnp.where(active & stale, number, state["scored_at"][index])
            table = {
                "scores": state["scores"].at[index].set(scores),
                "scored_at": state["scored_at"].at[index].set(at),
            }
            informed = active & (scores.sum(1, keepdims=True) > 0)
            weight = jnp.where(informed, scores, weight)
        return table, *adaw.sample_anchors(key, weight, settings.anchors)

    return pick


def criticality(
    target: Target,
    drafter: Drafter,
    state: State,
    target_params: dict,
    batch: Batch,
    window: int,
) -> jax.Array:
    """ADAW's score `[B, T]` of every anchor: one drafter step from each, against the target's law."""
    lesson = teacher.lesson_of(target, target_params, batch)
    weights = weights_of(state["params"], target_params, state["vocab"])
    head = draft_head(target.config, target_params, state["vocab"])
    tokens = batch["tokens"]
    B, T = tokens.shape
    prefix = windows.text_prefix(drafter, weights, lesson.taps, tokens)
    anchors = jnp.broadcast_to(jnp.minimum(jnp.arange(T), T - 2), (B, T))
    law_BxTxD = jnp.take_along_axis(lesson.hidden, anchors[..., None] + 1, 1)

    def choose(_: int, logits_BxLx1xN: jax.Array, law_BxLxD: jax.Array):
        divergence = objective.kl((law_BxLxD @ head.T)[:, :, None], logits_BxLx1xN)
        return jnp.zeros(divergence.shape, jnp.int32), divergence

    start = windows.text_starts(prefix, tokens, anchors)
    divergence = windows.window_pass(
        drafter, weights, prefix.keys_values, start, choose, 1, lambda step: law_BxTxD
    )
    entropy = jnp.take_along_axis(lesson.entropy, anchors + 1, 1)
    values = adaw.criticality(entropy, divergence[:, :, 0, 0], target.config.vocab_size)
    return adaw.anchor_scores(values, windows.anchor_mask(batch["assistant"]), window)


def make_update(
    target: Target,
    drafter: Drafter,
    optimizer: optax.GradientTransformation,
    settings: PPOWSettings,
    mesh: Mesh | None = None,
    remat: str = "none",
) -> Callable[..., tuple[State, dict[str, jax.Array]]]:
    """(learner, vocab, target parameters, batch, rollout, verdict) -> (learner, metrics); learner donated.

    With a mesh the learner keeps the layout of `partition.TABLE`. `remat`: see `windows.window_pass`.
    """

    @functools.partial(jax.jit, donate_argnums=0)
    def update(
        learner: State,
        vocab: jax.Array,
        target_params: dict,
        batch: Batch,
        rollout: Rollout,
        verdict: Verdict,
    ):
        lesson = teacher.lesson_of(target, target_params, batch)
        head = draft_head(target.config, target_params, vocab)
        counts = tuple(mask.sum() for mask in credit(settings, verdict))
        of = functools.partial(ppow_loss, drafter, settings, target_params, vocab, head, counts, remat)

        def once(carry: tuple, _: None) -> tuple:
            params, opt_state = carry
            rows = (lesson, batch, rollout, verdict)
            (loss, metrics), grads = training.gradient(of, params, settings.accumulate, *rows)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            metrics |= {"loss": loss, "grad_norm": optax.global_norm(grads)}
            return (optax.apply_updates(params, updates), opt_state), metrics

        carry = (learner["params"], learner["opt_state"])
        (params, opt_state), stacked = jax.lax.scan(once, carry, length=settings.updates)
        metrics = {k: v[-1] for k, v in stacked.items()}
        # Before the first update the recomputed log-probabilities are the rollout's, but for rounding.
        metrics["log_prob_gap"] = stacked["log_prob_gap"][0]
        metrics |= reward_metrics(rollout, verdict)
        return partition.hold({"params": params, "opt_state": opt_state}, mesh), metrics

    return update


def ppow_loss(
    drafter: Drafter,
    settings: PPOWSettings,
    target_params: dict,
    vocab: jax.Array,
    head_NxD: jax.Array,
    counts: tuple[jax.Array, jax.Array],
    remat: str,
    params: dict,
    lesson: teacher.Lesson,
    batch: Batch,
    rollout: Rollout,
    verdict: Verdict,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Clipped surrogate plus beta KL(P || Q), both per token; of a part of a batch, its share in both.

    `counts` are those of `credit` in the whole batch. The surrogate runs over the credited tokens. The KL
    runs over the tokens whose context the target accepted (j <= k): where the text is greedy that is where P
    is known, and it is the only place that decoding ever visits.
    """
    weights = weights_of(params, target_params, vocab)
    prefix = windows.text_prefix(drafter, weights, lesson.taps, batch["tokens"])
    start = windows.text_starts(prefix, batch["tokens"], rollout.anchors)

    as_one = drafted_as_one(settings)

    def given(step: int):
        ahead = windows.text_ahead(batch["tokens"], rollout.anchors, step)
        onward = ahead if as_one else rollout.tokens[..., step]
        return rollout.ids[..., step], onward, verdict.context[..., step, :]

    def choose(step: int, logits: jax.Array, told: tuple[jax.Array, ...]):
        ids, onward, context = told
        logp = jax.nn.log_softmax(logits / settings.rollout_temperature)
        entropy = -jnp.sum(jnp.exp(logp) * logp, -1)
        divergence = objective.kl(context @ head_NxD.T, logits)
        chosen = jnp.take_along_axis(
            jnp.broadcast_to(logp, (*ids.shape, logp.shape[-1])), ids[..., None], -1
        )[..., 0]
        return onward, (chosen, *(jnp.broadcast_to(x, ids.shape) for x in (entropy, divergence)))

    log_prob, entropy, divergence = windows.window_pass(
        drafter, weights, prefix.keys_values, start, choose, settings.window, given, remat
    )
    credited, reached = credit(settings, verdict)
    mean_credited = functools.partial(objective.masked_mean, mask=credited, count=counts[0])
    mean_reached = functools.partial(objective.masked_mean, mask=reached, count=counts[1])
    advantage = verdict.advantage[..., None]
    loss = objective.clipped_policy_loss(log_prob, rollout.log_prob, advantage, settings.clip)
    clipped = objective.clip_fraction(log_prob, rollout.log_prob, advantage, settings.clip)
    policy, kl = mean_credited(loss), mean_reached(divergence)
    gap = jnp.max(jnp.where(verdict.valid, jnp.abs(log_prob - rollout.log_prob), 0.0))
    return policy + settings.kl_weight * kl, {
        "policy_loss": policy,
        "kl": kl,
        "clip_fraction": mean_credited(clipped),
        "entropy": mean_reached(entropy),
        "log_prob_gap": gap,
    }


def credit(settings: PPOWSettings, verdict: Verdict) -> tuple[jax.Array, jax.Array]:
    """bool `[B, A, G, K]` both: tokens that the advantage credits, and those whose context was accepted."""
    reached = jnp.arange(settings.window) <= verdict.accepted[..., None]
    credited = verdict.valid
    if settings.credit == "accepted":
        # Beyond the first refusal a token matters through proximity alone, and only where that tells the
        # windows of a group apart; elsewhere it would be blamed or praised for nothing.
        near = (verdict.proximity > 0).any(-1, keepdims=True)
        judged = (verdict.accepted == 0) & near
        credited &= reached | judged[..., None]
    return credited, verdict.valid & reached


def reward_metrics(rollout: Rollout, verdict: Verdict) -> dict[str, jax.Array]:
    """What the rollout earned."""
    K = rollout.ids.shape[-1]
    real = jnp.broadcast_to(rollout.real[..., None], verdict.accepted.shape)
    mean = functools.partial(objective.masked_mean, mask=real)
    reward = verdict.speedup + verdict.proximity
    share = [mean((verdict.accepted == k).astype(jnp.float32)) for k in range(K + 1)]
    return {
        "reward": mean(reward),
        "reward_speedup": mean(verdict.speedup),
        "reward_proximity": mean(verdict.proximity),
        "accepted": mean(verdict.accepted.astype(jnp.float32)),
        "accepted_shares": jnp.stack(share),
        "share_refused": share[0],
        "share_without_spread": objective.masked_mean(
            advantages.without_spread(reward).astype(jnp.float32), rollout.real
        ),
    }
