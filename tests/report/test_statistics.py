"""Statistics on counts small enough to be worked by hand: tau, speed, and paired intervals."""

import numpy as np
import pytest

from ppow_jax.report import statistics
from ppow_jax.report.statistics import Decoded, Measured, Simulated, TurnDecoded, TurnRounds


def rounds(emitted: list[int], accepted: list[int], offered: list[int]) -> TurnRounds:
    return TurnRounds(*(np.array(x, np.int32) for x in (emitted, accepted, offered)))


def simple(*emitted: int) -> TurnRounds:
    """Rounds that accept all but the target's own token of what they emit, of three that were offered."""
    return rounds(list(emitted), [e - 1 for e in emitted], [3] * len(emitted))


def simulated(tokens, passes) -> Simulated:
    """By prompt; positions do not matter."""
    names = np.array([f"p{i}" for i in range(len(tokens))])
    return Simulated(names, np.asarray(tokens), np.asarray(passes), np.zeros(3, int), np.zeros(3, int))


def timed(tokens, seconds, plain_seconds) -> Decoded:
    """By prompt; autoregressive decoding writes as many tokens."""
    count = len(tokens)
    names, ones = np.array([f"p{i}" for i in range(count)]), np.ones(count, int)
    times = (np.asarray(tokens), np.asarray(seconds), np.asarray(tokens), np.asarray(plain_seconds))
    return Decoded(names, *times, ones, ones, ones > 0, None)


def acceptance(owners: list[str], turns: list[TurnRounds], window: int = 3) -> dict:
    return statistics.acceptance(statistics.by_prompt(owners, turns, window))


def test_tau_is_the_micro_average_over_rounds():
    """6 tokens in 2 passes and 4 in 4 are 10 / 6, not the mean of 3 and 1."""
    found = acceptance(["a", "b"], [simple(4, 2), simple(1, 1, 1, 1)])
    assert found["tau"] == pytest.approx(10 / 6)
    assert (found["tokens"], found["rounds"]) == (10, 6)


def test_interval_resamples_prompts():
    """Of two prompts a resample is aa (tau 3), ab or ba (10 / 6), bb (1), each bb and aa in a quarter."""
    two = acceptance(["a", "b"], [simple(4, 2), simple(1, 1, 1, 1)])
    assert two["tau_ci95"] == [1.0, 3.0]
    # Turns of one prompt belong together: there is nothing to resample.
    one = acceptance(["a", "a"], [simple(4, 2), simple(1, 1, 1, 1)])
    assert one["tau_ci95"] == pytest.approx([10 / 6, 10 / 6])
    assert one["tau"] == two["tau"]


def test_interval_narrows_with_the_prompts():
    """400 prompts, half with tau 1 and half with tau 2, in one pass each: sd of the mean 0.025."""
    found = acceptance([str(i) for i in range(400)], [simple(1 + i % 2) for i in range(400)])
    assert found["tau"] == 1.5
    assert found["tau_ci95"] == pytest.approx([1.5 - 0.049, 1.5 + 0.049], abs=0.006)


def test_acceptance_by_position_counts_only_what_was_offered():
    found = acceptance(["a", "b"], [rounds([3, 1], [2, 0], [3, 3]), rounds([2], [1], [1])], 4)
    # position 1: 2 of 3 rounds; position 2: 1 of the 2 that offered one; 3: none of 2; 4: never offered
    assert found["accepted_per_position"] == pytest.approx([2 / 3, 1 / 2, 0, 0])


def decoded(prompt: str, tokens: list[int], emitted: list[int], seconds: float) -> TurnDecoded:
    return TurnDecoded(prompt, np.array(tokens), np.array(emitted), seconds)


def test_speed_and_identity_by_prompt():
    plain = [
        decoded("a", [1, 2, 3, 4], [1, 1, 1], 2.0),
        decoded("a", [5, 6], [1], 1.0),
        decoded("b", [7, 8], [1], 1.0),
    ]
    drafted = [
        decoded("a", [1, 2, 3, 9], [2, 1], 1.0),  # one turn differs: prompt a does
        decoded("a", [5, 6], [1], 0.5),
        decoded("b", [7, 8], [1], 0.5),
    ]
    expected = [np.array([2, 1]), np.array([1]), np.array([1, 1])]
    found = statistics.decoded_by_prompt(plain, drafted, expected)
    assert found.seconds.tolist() == [1.5, 0.5] and found.plain_seconds.tolist() == [3.0, 1.0]
    assert statistics.speed(found) == {
        "tokens_per_s": 4.0,  # 8 tokens in 2 s
        "tokens_per_s_autoregressive": 2.0,  # 8 in 4
        "speedup": 2.0,
        "decode_tau": 5 / 4,
        "identical_outputs": 1,
        "same_rounds_as_simulated": 1,
        "prompts": 2,
    }
    sampled = statistics.speed(statistics.decoded_by_prompt(plain, drafted, None))
    assert "same_rounds_as_simulated" not in sampled and sampled["speedup"] == 2.0


def test_a_difference_is_that_of_the_same_resample():
    """Of two prompts a resample is aa, ab or bb; one drafter and the other are read on the same one.

    aa: 6/2 - 4/2 = 1; bb: 5/4 - 4/4 = 1/4. Read on others, aa against bb would give up to 3 - 1.
    """
    value, ci95 = statistics.difference(
        statistics.tau, [([simulated([6, 5], [2, 4])], [simulated([4, 4], [2, 4])])]
    )
    assert value == pytest.approx(11 / 6 - 8 / 6)
    assert ci95 == pytest.approx([1 / 4, 1])


def test_a_speedups_difference_is_paired_by_prompt():
    """aa: 4/2 - 4/4; bb: 4/1 - 4/1; ab, which is most of all: 8/3 - 8/5."""
    one, other = timed([10, 10], [2.0, 1.0], [4.0, 4.0]), timed([10, 10], [4.0, 1.0], [4.0, 4.0])
    value, ci95 = statistics.difference(statistics.speedup, [([one], [other])])
    assert value == pytest.approx(8 / 3 - 8 / 5)
    assert ci95 == pytest.approx([0, 8 / 3 - 8 / 5])
    # the same in a session on a machine half as fast
    slow = other._replace(seconds=other.seconds * 2, plain_seconds=other.plain_seconds * 2)
    again = statistics.difference(statistics.speedup, [([one], [slow])])
    assert again[0] == pytest.approx(value) and again[1] == pytest.approx(ci95)


@pytest.fixture
def hard_and_easy() -> Simulated:
    """60 prompts of 20 passes with tau from 1 to 5."""
    rng = np.random.default_rng(5)
    return simulated(rng.integers(20, 100, 60), np.full(60, 20))


def test_a_constant_gain_is_told_from_nothing(hard_and_easy):
    """A token more in twenty passes of every prompt: 0.05 on every resample, far below tau's own interval."""
    better = hard_and_easy._replace(tokens=hard_and_easy.tokens + 1)
    value, ci95 = statistics.difference(statistics.tau, [([better], [hard_and_easy])])
    assert value == pytest.approx(0.05) and ci95 == pytest.approx([0.05, 0.05])
    _, (low, high) = statistics.estimate(statistics.tau, [hard_and_easy])
    assert high - low > 0.4


@pytest.mark.parametrize("seed", range(4))
def test_noise_is_not(hard_and_easy, seed):
    noise = np.random.default_rng(seed).permutation(np.repeat([-6, 6], 30))
    noisy = hard_and_easy._replace(tokens=hard_and_easy.tokens + noise)
    value, (low, high) = statistics.difference(statistics.tau, [([noisy], [hard_and_easy])])
    assert value == pytest.approx(0)
    assert low < -0.04 and high > 0.04  # 0.3 tokens a pass, either way: sd of the mean of 60 is 0.039


def test_a_difference_changes_its_sign_with_the_sides(hard_and_easy):
    other = simulated(hard_and_easy.tokens[::-1], np.full(60, 25))
    value, (low, high) = statistics.difference(statistics.tau, [([hard_and_easy], [other])])
    back, (back_low, back_high) = statistics.difference(statistics.tau, [([other], [hard_and_easy])])
    assert (back, back_low, back_high) == pytest.approx((-value, -high, -low))


def test_a_paired_interval_is_narrower_on_correlated_prompts(hard_and_easy):
    noise = np.random.default_rng(1).integers(-3, 6, 60)
    noisy = hard_and_easy._replace(tokens=hard_and_easy.tokens + noise)
    _, (low, high) = statistics.difference(statistics.tau, [([noisy], [hard_and_easy])])
    one = statistics.tau(noisy, statistics.resamples(60, seed=1))
    other = statistics.tau(hard_and_easy, statistics.resamples(60, seed=2))
    apart = np.percentile(one - other, [2.5, 97.5])
    assert high - low < 0.2 * (apart[1] - apart[0])


def test_benchmarks_count_alike_and_are_resampled_by_themselves():
    """Two benchmarks, of which one is the other back to front: drawn alike, they would cancel out."""
    forth, back = simulated([40, 10], [10, 10]), simulated([10, 40], [10, 10])
    value, ci95 = statistics.estimate(statistics.tau, [forth, back])
    assert value == pytest.approx(2.5) and ci95 == pytest.approx([1, 4])
    # 90 prompts weigh no more than 1
    one, many = simulated([30], [10]), simulated([10] * 90, [10] * 90)
    assert statistics.estimate(statistics.tau, [one, many])[0] == pytest.approx(2)
    control = simulated([20], [10]), simulated([10] * 90, [10] * 90)
    value, ci95 = statistics.difference(statistics.tau, [([one], [control[0]]), ([many], [control[1]])])
    assert value == pytest.approx(0.5) and ci95 == pytest.approx([0.5, 0.5])


def test_repetitions_on_a_side_count_with_their_mean():
    ones = [simulated([20, 20], [10, 10]), simulated([40, 40], [10, 10])]
    value, ci95 = statistics.difference(statistics.tau, [(ones, [simulated([10, 10], [10, 10])])])
    assert value == pytest.approx(2) and ci95 == pytest.approx([2, 2])


def test_drafters_of_other_prompts_are_not_compared():
    other = simulated([1, 1], [1, 1])._replace(prompts=np.array(["p1", "p0"]))
    with pytest.raises(ValueError, match="the same prompts"):
        statistics.difference(statistics.tau, [([simulated([1, 1], [1, 1])], [other])])


def measured(tokens: int, tree: int | None, seconds: float) -> Measured:
    """A prompt of ten passes."""
    trees = None if tree is None else simulated([tree], [10])
    return Measured(simulated([tokens], [10]), trees, timed([20], [seconds], [4.0]))


def test_chain_tree_and_speed_have_keys_of_their_own():
    two = [measured(20, 30, 2.0), measured(40, 50, 1.0)]
    assert {k: v for k, v in statistics.mean(two).items() if not k.endswith("ci95")} == pytest.approx(
        {"tau": 3.0, "speedup": 3.0, "tau_tree": 4.0}
    )
    result = statistics.result(two[0])
    assert (result["tau"], result["tau_tree"], result["speedup"]) == (2.0, 3.0, 2.0)
    assert result["tau_ci95"] == [2.0, 2.0] and result["tau_tree_ci95"] == [3.0, 3.0]
    found = statistics.compared([([two[1]], [two[0]])])
    assert found == {
        "difference": {"tau": 2.0, "ci95": [2.0, 2.0], "speedup": 2.0, "speedup_ci95": [2.0, 2.0]},
        "difference_tree": {"tau": 2.0, "ci95": [2.0, 2.0]},
    }
    chains = [of._replace(tree=None) for of in two]
    assert set(statistics.compared([([chains[1]], [chains[0]])])) == {"difference"}
    assert "tau_tree" not in statistics.result(chains[0]) and "tau_tree" not in statistics.mean(chains)


def test_spread_over_seeds():
    found = statistics.spread([{"tau": 1.0, "speedup": 2.0}, {"tau": 2.0, "speedup": 2.0}])
    assert found == pytest.approx({"tau": 1.5, "tau_std": 0.5**0.5, "speedup": 2.0, "speedup_std": 0.0})


@pytest.mark.parametrize("of", [simulated([3, 4], [1, 2]), timed([3, 4], [1.5, 0.1], [2.0, 2.5])])
def test_what_was_measured_comes_back_from_json(of):
    import json

    again = statistics.from_json(type(of), json.loads(json.dumps(statistics.to_json(of))))
    for name, value in of._asdict().items():
        np.testing.assert_array_equal(getattr(again, name), value)
