"""Losses against NumPy in float64, written from the formulas; by hand; at their limits; their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppow_jax.errors import ConfigError
from ppow_jax.objectives import losses
from ppow_jax.objectives.losses import renormalised, unnormalised

P, Q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.5, 0.25])
LOG_P, LOG_Q = jnp.float32(np.log(P)), jnp.float32(np.log(Q))
LN2 = np.log(2.0)
NAMES = (*losses.LOSSES, *losses.HYBRIDS)


@jax.jit
def every(target, logits):
    """All losses by name; the hybrid of the batch at the mean acceptance 1/2."""
    own = {n: losses.weighted_sum(((1.0, n),), target, logits) for n in NAMES if n != "lk_batch"}
    return own | {"lk_batch": losses.lk_hybrid(target, logits, 0.5)}


@jax.jit
def every_gradient(target, logits):
    """Of the sum over positions."""
    return {name: jax.grad(lambda z, name=name: every(target, z)[name].sum())(logits) for name in NAMES}


def softmax(logits):
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def divergence(p, q):
    """KL(p || q), with 0 log 0 = 0."""
    some = p > 0
    return np.sum(p[some] * np.log(p[some] / q[some]))


def references(T, q):
    """Every loss of one position in float64; T may sum to less than 1, the rest lies where q has nothing."""
    inside = T / T.sum()
    m, a = (inside + q) / 2, np.minimum(T, q).sum()
    return {
        "cross_entropy": -np.sum(inside * np.log(q)),
        "kl": divergence(inside, q),
        "reverse_kl": divergence(q, np.maximum(inside, np.finfo(np.float32).tiny)),
        "jensen_shannon": (divergence(inside, m) + divergence(q, m)) / 2,
        "hard_cross_entropy": -np.log(q[np.argmax(T)]),
        "total_variation": (np.abs(T - q).sum() + 1.0 - T.sum()) / 2,  # over the whole vocabulary
        "neg_log_acceptance": -np.log(a),
    }


def target_of(kind, logits_V, N):
    """A target of V tokens over the first N of them, and the reference's T."""
    draft = logits_V[:N].astype(np.float32)
    if kind == "renormalised":
        return renormalised(draft), softmax(logits_V[:N])
    if kind == "cool":
        return renormalised(draft, 0.5), softmax(logits_V[:N] / 0.5)
    if kind == "greedy":
        return renormalised(draft, 0.0), np.eye(N)[np.argmax(logits_V[:N])]
    normaliser = np.float32(np.log(np.exp(logits_V / 0.7).sum()))
    return unnormalised(draft, 0.7, log_normaliser=normaliser), softmax(logits_V / 0.7)[:N]


@pytest.mark.parametrize("kind", ["renormalised", "cool", "greedy", "unnormalised"])
def test_values_and_gradients_are_those_of_the_reference(kind):
    """Twelve random pairs; the gradients by central differences of the reference."""
    for both in 2.0 * np.random.default_rng(len(kind)).normal(size=(12, 17)):
        logits_V, logits = both[:10], both[10:]
        target, T = target_of(kind, logits_V, 7)
        values, gradients = every(target, jnp.float32(logits)), every_gradient(target, jnp.float32(logits))
        moved = [[references(T, softmax(logits + s * e)) for s in (-1e-6, 1e-6)] for e in np.eye(7)]
        for name, expected in references(T, softmax(logits)).items():
            slope = [(after[name] - before[name]) / 2e-6 for before, after in moved]
            np.testing.assert_allclose(values[name], expected, rtol=2e-5, atol=2e-6, err_msg=name)
            np.testing.assert_allclose(gradients[name], slope, rtol=2e-4, atol=2e-5, err_msg=name)


def test_by_hand_in_nats():
    """P = (1/2, 1/4, 1/4), Q = (1/4, 1/2, 1/4); any level of the logits.

    H(P, Q) = .5 ln 4 + .25 ln 2 + .25 ln 4; H(P) = .5 ln 2 + .5 ln 4; both divergences .25 ln 2.
    m = (3/8, 3/8, 1/4): KL(P || m) = .5 ln(4/3) + .25 ln(2/3), and KL(Q || m) is the same.
    """
    expected = {
        "cross_entropy": 1.75 * LN2,
        "kl": 0.25 * LN2,
        "reverse_kl": 0.25 * LN2,
        "jensen_shannon": 0.5 * np.log(4 / 3) + 0.25 * np.log(2 / 3),
        "hard_cross_entropy": 2 * LN2,
        "total_variation": 0.25,
        "neg_log_acceptance": np.log(4 / 3),
    }
    assert set(expected) == set(losses.LOSSES) == set(references(P, Q))
    target, logits = renormalised(LOG_P + 7.0), LOG_Q - 3.0
    for name, value in expected.items():
        assert float(losses.LOSSES[name](target, logits)) == pytest.approx(value, rel=2e-6), name
    assert float(losses.acceptance(target, logits)) == pytest.approx(0.75)
    share = np.exp(-0.75 * 3)
    hybrid = losses.lk_hybrid(target, logits, losses.acceptance(target, logits))
    assert float(hybrid) == pytest.approx(share * 0.25 * LN2 + (1 - share) * 0.25, rel=1e-5)


def test_by_hand_with_half_of_the_target_outside():
    """T = P / 2: a = 1/4 + 1/8 + 1/8; the divergences do not see the mass."""
    target = unnormalised(LOG_P, log_normaliser=jnp.float32(LN2))  # the draft vocabulary's own is log 1
    expected = {"total_variation": 0.5, "neg_log_acceptance": LN2, "cross_entropy": 1.75 * LN2}
    for name, value in expected.items():
        assert float(losses.LOSSES[name](target, LOG_Q)) == pytest.approx(value, rel=2e-6), name
    assert float(losses.acceptance(target, LOG_Q)) == pytest.approx(0.5)
    over = unnormalised(LOG_P, log_normaliser=jnp.float32(-1e-3))  # by rounding
    assert float(target.mass) == pytest.approx(0.5) and float(over.mass) == 1.0


def test_temperature():
    """Divides the logits; 0 is one-hot at the first of the largest."""
    target = renormalised(2.0 * LOG_P, 2.0)
    np.testing.assert_allclose((target.probs, jnp.exp(target.log_probs)), (P, P), rtol=1e-6)
    target = renormalised(jnp.array([[1.0, 3.0, 3.0], [-5.0, -7.0, -6.0]]), 0.0)
    np.testing.assert_array_equal(target.probs, [[0, 1, 0], [1, 0, 0]])
    np.testing.assert_array_equal(target.log_probs, np.float32([[-1e30, 0, -1e30], [0, -1e30, -1e30]]))
    np.testing.assert_array_equal(target.mass, [1, 1])


def test_a_greedy_target_outside_the_draft_vocabulary():
    """Nothing can be accepted there, so nothing pulls."""
    log_p, log_q = (jnp.broadcast_to(x, (2, 3)) for x in (LOG_P, LOG_Q))
    target = unnormalised(log_p, 0.0, argmax_inside=jnp.array([True, False]))
    np.testing.assert_allclose(losses.acceptance(target, log_q), [0.25, 0.0], rtol=1e-6)
    np.testing.assert_allclose(losses.total_variation(target, log_q), [0.75, 1.0], rtol=1e-6)
    np.testing.assert_allclose(losses.neg_log_acceptance(target, log_q), [2 * LN2, 0.0], rtol=1e-6)
    for loss in (losses.total_variation, losses.neg_log_acceptance):
        gradient = jax.grad(lambda z, loss=loss: loss(target, z)[1])(log_q)
        np.testing.assert_array_equal(gradient, np.zeros((2, 3)))


def test_a_target_that_lacks_something_is_refused():
    with pytest.raises(ValueError, match="temperature -1"):
        renormalised(LOG_P, -1.0)
    with pytest.raises(ValueError, match="argmax_inside"):
        unnormalised(LOG_P, 0.0, log_normaliser=jnp.float32(2.0))
    with pytest.raises(ValueError, match="log_normaliser"):
        unnormalised(LOG_P, 1.0, argmax_inside=jnp.array(True))


def test_no_gradient_through_the_target():
    def of(target_logits):
        normaliser = 1.0 + 2.0 * jax.nn.logsumexp(target_logits)
        return every(unnormalised(target_logits, log_normaliser=normaliser), LOG_Q)

    for name, slope in jax.jacrev(of)(LOG_P).items():
        np.testing.assert_array_equal(slope, np.zeros(3), err_msg=name)


def test_cross_entropy_and_kl_are_those_of_earlier_runs():
    """Written otherwise; to rounding, values and gradients."""

    def old_cross_entropy(target_logits, logits):
        p = jax.nn.softmax(target_logits, axis=-1)
        return -jnp.sum(p * jax.nn.log_softmax(logits, axis=-1), axis=-1)

    def old_kl(target_logits, logits):
        logp = jax.nn.log_softmax(target_logits, axis=-1)
        return jnp.sum(jnp.exp(logp) * (logp - jax.nn.log_softmax(logits, axis=-1)), axis=-1)

    def new(name):
        return lambda t, z: losses.weighted_sum(((1.0, name),), renormalised(t), z)

    def with_gradient(f, t, z):
        return f(t, z), jax.grad(lambda z: jnp.sum(f(t, z)))(z)

    t, z = jnp.float32(4.0 * np.random.default_rng(0).normal(size=(2, 5, 3, 96)))
    for f, name in ((old_cross_entropy, "cross_entropy"), (old_kl, "kl")):
        for run in (with_gradient, jax.jit(with_gradient, static_argnums=0)):
            before, after = run(f, t, z), run(new(name), t, z)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), before, after)


def test_where_q_is_the_target():
    """All is 0, but for the entropy in the cross-entropy, and the pull of a hard label."""
    logits = jnp.float32(np.random.default_rng(3).normal(size=9))
    q, target = softmax(np.float64(logits)), renormalised(logits)
    kept = {"hard_cross_entropy": -np.log(q.max()), "cross_entropy": -np.sum(q * np.log(q))}
    for name, value in every(target, logits).items():
        assert float(value) == pytest.approx(kept.get(name, 0.0), abs=3e-7), name
    for name, gradient in every_gradient(target, logits).items():
        pull = q - (q == q.max()) if name == "hard_cross_entropy" else 0.0
        np.testing.assert_allclose(gradient, pull, atol=1e-6, err_msg=name)


def test_disjoint_supports():
    """T on the first two tokens, q on the others: a = exp(-200) + exp(-300) underflows, -log a does not."""
    target = renormalised(jnp.array([0.0, 0.0, -300.0, -300.0]))
    logits = jnp.array([-200.0, -200.0, 0.0, 0.0])
    value, gradient = jax.value_and_grad(losses.neg_log_acceptance, argnums=1)(target, logits)
    assert float(value) == pytest.approx(200.0, rel=1e-6)
    np.testing.assert_allclose(gradient, [-0.5, -0.5, 0.5, 0.5], atol=1e-6)
    assert (float(losses.acceptance(target, logits)), float(losses.total_variation(target, logits))) == (0, 1)
    assert float(losses.jensen_shannon(target, logits)) == pytest.approx(LN2, rel=1e-6)
    assert float(losses.kl(target, logits)) == pytest.approx(200.0, rel=1e-6)
    floored = -np.log(np.finfo(np.float32).tiny) - LN2
    assert float(losses.reverse_kl(target, logits)) == pytest.approx(floored, rel=1e-6)


@pytest.mark.parametrize("logits", [[0.3, -1.0, 0.4], [-90.0, 10.0, 0.0], [-400.0, 0.0, 5.0]])
def test_minus_log_acceptance_of_a_one_hot_target_is_the_cross_entropy(logits):
    target, logits = renormalised(jnp.array([2.0, 0.0, 1.0]), 0.0), jnp.array(logits)
    expected = jax.value_and_grad(losses.hard_cross_entropy, argnums=1)(target, logits)
    for loss in (losses.neg_log_acceptance, losses.cross_entropy, losses.kl):
        got = jax.value_and_grad(loss, argnums=1)(target, logits)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), got, expected)


EXTREME = [  # target's logits, drafter's logits
    ([0.0, -1e4, 1e4], [0.0, 0.0, 0.0]),
    ([0.0, 0.0, 0.0], [1e4, -1e4, 0.0]),
    ([1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]),
    ([1e30, 0.0, -1e30], [-1e30, 0.0, 1e30]),
    ([5.0, 5.0, 5.0], [5.0, 5.0, 5.0]),
]


@pytest.mark.parametrize("kind", ["greedy", "renormalised", "greedy outside", "mostly outside"])
def test_finite_at_extremes(kind):
    target_logits, logits = map(jnp.array, zip(*EXTREME, strict=True))
    target = renormalised(target_logits, 0.0 if "greedy" in kind else 1.0)
    mass = {"greedy outside": 0.0, "mostly outside": 1e-37}.get(kind, 1.0)
    target = target._replace(mass=mass * target.mass)
    for results in (every(target, logits), every_gradient(target, logits)):
        assert all(np.isfinite(x).all() for x in results.values()), results


def random_pairs(seed, count, N, outside=0.0):
    """Targets of mass exp(-outside), their logits, and drafters' logits."""
    rng = np.random.default_rng(seed)
    target_logits, logits = (jnp.float32(3.0 * rng.normal(size=(count, N))) for _ in range(2))
    normaliser = jax.nn.logsumexp(target_logits, -1) + outside
    return unnormalised(target_logits, log_normaliser=normaliser), logits


def test_the_level_of_the_logits_does_not_matter():
    target, logits = random_pairs(1, 50, 12, outside=0.3)
    there = every(renormalised(target.log_probs + 3.0)._replace(mass=target.mass), logits - 5.0)
    for name, here in every(target, logits).items():
        np.testing.assert_allclose(there[name], here, rtol=1e-4, atol=1e-5, err_msg=name)
    for name, gradient in every_gradient(target, logits).items():
        np.testing.assert_allclose(gradient.sum(-1), 0.0, atol=1e-5, err_msg=name)


def test_inequalities():
    """Pinsker's; Jensen-Shannon's bounds (Lin 1991); Bretagnolle's and Huber's, 1 - a <= 1 - exp(-KL) / 2."""
    target, logits = random_pairs(2, 500, 12)
    value = {name: np.asarray(values) for name, values in every(target, logits).items()}
    tv, slack = value["total_variation"], 1e-6
    assert ((tv >= 0) & (tv <= 1)).all()
    assert (2 * tv**2 <= np.minimum(value["kl"], value["reverse_kl"]) + slack).all()
    assert (value["jensen_shannon"] <= LN2 * tv + slack).all()
    assert (value["jensen_shannon"] >= tv**2 / 2 - slack).all()
    assert (value["neg_log_acceptance"] >= tv - slack).all()
    assert (value["neg_log_acceptance"] <= value["kl"] + LN2 + slack).all()


def test_total_variation_is_one_minus_acceptance_whatever_the_mass():
    target, logits = random_pairs(4, 100, 12, outside=jnp.linspace(0.0, 4.0, 100))
    a = losses.acceptance(target, logits)
    np.testing.assert_allclose(losses.total_variation(target, logits), 1.0 - a, atol=1e-6)
    np.testing.assert_allclose(losses.neg_log_acceptance(target, logits), -np.log(a), rtol=1e-4, atol=1e-6)


def test_acceptance_is_how_often_samples_are_accepted():
    """A token x of q is kept with probability min(1, T(x) / q(x))."""
    rng = np.random.default_rng(5)
    T, q = 0.8 * softmax(rng.normal(size=6)), softmax(rng.normal(size=6))
    x = rng.choice(6, size=200_000, p=q)
    kept = rng.random(len(x)) < T[x] / q[x]
    target = unnormalised(jnp.float32(np.log(T)), log_normaliser=jnp.float32(0.0))
    a = float(losses.acceptance(target, jnp.float32(np.log(q))))
    assert kept.mean() == pytest.approx(a, abs=5 * 0.5 / np.sqrt(len(x)))


def test_leading_axes_broadcast():
    """One target for a group of windows, and one window for a group of targets."""
    rng = np.random.default_rng(6)
    for shapes in (((2, 1, 3, 5), (2, 4, 3, 5)), ((2, 4, 3, 5), (2, 1, 3, 5)), ((2, 4, 3, 5), (5,))):
        t, z = (jnp.float32(rng.normal(size=s)) for s in shapes)
        got = every(renormalised(t), z)
        t, z = jnp.broadcast_to(t, (2, 4, 3, 5)), jnp.broadcast_to(z, (2, 4, 3, 5))
        whole = every(renormalised(t), z)
        for name in NAMES:
            assert got[name].shape == (2, 4, 3) and got[name].dtype == jnp.float32, name
            np.testing.assert_allclose(got[name], whole[name], rtol=1e-6, err_msg=name)


def test_the_hybrid_of_the_batch_and_of_each_position():
    target, logits = random_pairs(7, 20, 8, outside=0.4)
    T, q = target.mass[:, None] * softmax(np.float64(target.log_probs)), softmax(np.float64(logits))
    of = [references(*pair) for pair in zip(np.float64(T), q, strict=True)]
    kl, tv = (np.array([x[name] for x in of]) for name in ("kl", "total_variation"))
    for name, a in (("lk_batch", 0.25), ("lk_position", 1 - tv)):
        for scale, decay, *given in ((1.0, 3.0), (0.9, 2.0, 0.9, 2.0)):  # the defaults, then given ones
            share = scale * np.exp(-decay * a)
            if name == "lk_batch":
                got = losses.lk_hybrid(target, logits, jnp.float32(0.25), *given)
            else:
                got = losses.weighted_sum(((1.0, name),), target, logits, *given)
            np.testing.assert_allclose(got, share * kl + (1 - share) * tv, rtol=1e-5)


def test_lambda_has_no_gradient():
    """With the acceptance of the position itself, the gradient is that of a constant lambda."""
    target, logits = random_pairs(8, 20, 8, outside=0.4)
    share = np.exp(-3.0 * np.asarray(losses.acceptance(target, logits)))

    def own(z):
        return losses.weighted_sum(((1.0, "lk_position"),), target, z).sum()

    def constant(z):
        return jnp.sum(share * losses.kl(target, z) + (1 - share) * losses.total_variation(target, z))

    np.testing.assert_allclose(jax.grad(own)(logits), jax.grad(constant)(logits), rtol=1e-4, atol=1e-6)


def test_weighted_sum_weighs_sums_and_asks_for_what_it_needs():
    target, logits = random_pairs(9, 20, 8)
    got = losses.weighted_sum(((2.0, "kl"), (0.25, "total_variation"), (1.0, "kl")), target, logits)
    expected = 3.0 * losses.kl(target, logits) + 0.25 * losses.total_variation(target, logits)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert losses.needs_batch_acceptance(((1.0, "kl"), (1.0, "lk_batch")))
    assert not losses.needs_batch_acceptance(((1.0, "kl"), (1.0, "lk_position")))
    with pytest.raises(ValueError, match="found lk_batch"):
        losses.weighted_sum(((1.0, "lk_batch"),), target, logits)
    with pytest.raises(ValueError, match="no terms"):
        losses.weighted_sum((), target, logits)


def test_parse_losses():
    parsed = losses.parse_losses(" kl + 0.5*total_variation+2e-1 * lk_batch", "key")
    assert parsed == ((1.0, "kl"), (0.5, "total_variation"), (0.2, "lk_batch"))
    assert losses.parse_losses("1e+2*kl+2e-1*kl", "key") == ((100.0, "kl"), (0.2, "kl"))
    assert all(losses.parse_losses(name, "key") == ((1.0, name),) for name in NAMES)


def test_a_loss_of_ones_own_is_found_where_it_stands():
    name = "ppow_jax.objectives.losses:kl"
    terms = losses.parse_losses(f"2*{name}", "key")
    got = losses.weighted_sum(terms, renormalised(LOG_P), LOG_Q)
    assert terms == ((2.0, name),) and float(got) == pytest.approx(0.5 * LN2, rel=1e-5)


@pytest.mark.parametrize("name", ["math:pi", ".foo:bar", ":kl", "none_such:f", "math:none"])
def test_what_is_no_loss_is_refused(name):
    with pytest.raises(ConfigError, match=f"found the loss '{name}' in '{name}', expected one of"):
        losses.parse_losses(name, "key")


BAD = [("kll", "loss 'kll'"), ("kl+", "loss ''"), ("kl*0.5", "loss '0.5'"), ("*kl", "weight ''")]
BAD += [(f"{weight}*kl", f"weight '{weight}'") for weight in ("half", "0", "-1", "inf", "nan")]


@pytest.mark.parametrize(("text", "found"), BAD)
def test_parse_losses_says_what_is_wrong_in_one_line(text, found):
    expected = "a positive number" if "weight" in found else f"one of {', '.join(NAMES)}, or module:function"
    with pytest.raises(ConfigError) as caught:
        losses.parse_losses(text, "config.loss")
    assert str(caught.value).startswith(f"config.loss: found the {found} in {text!r}, expected {expected}")
    assert "\n" not in str(caught.value)


def test_masked_mean_counts_what_the_mask_shows():
    values, mask = np.array([[1.0, 2.0], [4.0, 100.0]], np.float32), np.array([[True, True], [True, False]])
    assert float(losses.masked_mean(values, mask)) == pytest.approx(7 / 3)
    assert float(losses.masked_mean(values, mask[:, :1])) == pytest.approx(107 / 4)  # broadcast
    assert float(losses.masked_mean(values, np.zeros((2, 2), bool))) == 0.0


CASES = [  # ratio, advantage, loss, d loss / d log_prob, clipped
    (1.5, 2.0, -2.4, 0.0, 1.0),
    (1.5, -2.0, 3.0, 3.0, 0.0),
    (0.5, 2.0, -1.0, -1.0, 0.0),
    (0.5, -2.0, 1.6, 0.0, 1.0),
    (1.1, 2.0, -2.2, -2.2, 0.0),
    (0.9, -2.0, 1.8, 1.8, 0.0),
    (1.5, 0.0, 0.0, 0.0, 0.0),
    (0.5, 0.0, 0.0, 0.0, 0.0),
]


@pytest.mark.parametrize(("ratio", "advantage", "loss", "slope", "clipped"), CASES)
def test_the_clipped_loss_of_every_sign_and_side(ratio, advantage, loss, slope, clipped):
    """Clip 0.2. It stops the gradient only where it would push the ratio further out."""
    log_prob, args = -1.3 + np.log(ratio), (-1.3, advantage, 0.2)
    got, gradient = jax.value_and_grad(losses.clipped_policy_loss)(log_prob, *args)
    assert float(got) == pytest.approx(loss, rel=1e-5)
    assert float(gradient) == pytest.approx(slope, rel=1e-5, abs=1e-6)
    assert float(losses.clip_fraction(log_prob, *args)) == clipped
