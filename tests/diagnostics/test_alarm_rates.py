"""Rates of false alarms and delays of detection, measured on simulated runs; docs/main_job.md has a table of them.

A healthy run learns at a random speed and then stays on a plateau, whose level drifts by up to one standard deviation
of the noise. The sizes of the noise are those of logged PPO runs with 256 answers per batch. Noise is autocorrelated.
"""

import math

import numpy as np
import pytest

from rlhf_jax.diagnostics import alarms, falls

NOISES = {"0.5": (0.5, None), "heavy tails": (0.5, 4), "0.8": (0.8, None)}
"""Autocorrelation of neighbouring rows, and degrees of freedom of the t distribution of the innovations, if any."""


def noise(rng, runs, rows, rho, df=None):
    """Returns autocorrelated noise with standard deviation 1 as ``[runs, rows]``."""
    size = (runs, rows + 50)
    steps = rng.normal(size=size) if df is None else rng.standard_t(df, size=size) * math.sqrt((df - 2) / df)
    values = np.empty_like(steps)
    values[:, 0] = steps[:, 0]
    for t in range(1, rows + 50):
        values[:, t] = rho * values[:, t - 1] + math.sqrt(1 - rho**2) * steps[:, t]
    return values[:, 50:]


def healthy(rng, runs, rows, kind, *, learns=True):
    """Returns the metrics of healthy runs, each as ``[runs, rows]``."""

    def e():
        return noise(rng, runs, rows, *NOISES[kind])

    t = np.arange(rows)
    speed = np.exp(rng.uniform(math.log(4), math.log(max(rows / 5, 6)), size=(runs, 1)))
    progress = learns * (1 - np.exp(-t / speed))
    drift = 0.01 * rng.uniform(-1, 1, size=(runs, 1)) * t / rows
    return {
        "reward": 0.8 * progress + 0.04 * e(),
        "gold": 0.77 + 0.16 * progress + drift + 0.01 * e(),
        "kl": 2.5 * progress + 0.2 * np.sqrt(progress) * e(),
        "ratio_max": 2 * np.exp(0.45 * e()),
        "first_ratio_error": 4e-6 * np.exp(0.3 * e()),
        "sampler_gap": 5e-6 * np.exp(0.3 * e()),
        "sampler_gap_mean": 3e-7 * np.exp(0.1 * e()),
        "entropy": 0.63 - 0.3 * progress + 0.02 * e(),
        "stopped": np.minimum(1, 0.93 + 0.06 * progress + 0.01 * e()),
        "training_reward_std": np.abs(0.7 + 0.07 * e()),
        "loss": 0.7 - 0.15 * t / rows + 0.014 * e(),  # the mean of the 25 rows between two measurements
        "validation_loss": 0.68 - 0.13 * progress + drift + 0.01 * e(),
    }


def first_rows(fired, tested):
    """Returns the row of each run's first alarm, given one array of booleans per tested row; infinity for none."""
    fired = np.stack(fired, axis=1)
    return np.where(fired.any(axis=1), np.array(tested)[fired.argmax(axis=1)], np.inf)


def opposed(values, other, other_noise, *, method=falls.measure):
    return falls.falls_alone(values, other, lost_share=1 / 3, other_noise=other_noise, method=method)[0]


def overfits(runs, rows):
    series = (-runs["validation_loss"][:, :rows], -runs["loss"][:, :rows])
    jumps = opposed(*series, 0.0, method=falls.jump) if rows in falls.JUMP_ROWS else False
    return opposed(*series, 0.0) | jumps


def below_start(rewards):
    fall = falls.measure(rewards, from_start=True)
    return fall.size > fall.bound


COMPARING = {
    # name of the check: (first row that it tests, whether it raises the alarm after n rows)
    "reward_below_start": (8, lambda m, n: below_start(m["reward"][:, :n])),
    "overoptimised": (8, lambda m, n: opposed(m["gold"][:, :n], m["reward"][:, :n], 1.0)),
    "overfitted": (5, overfits),
}
"""The checks that compare windows of rows, for all runs at once."""
THRESHOLDS = tuple(name for name in alarms.CHECKS if name not in COMPARING)


def compared(runs, names, *, every=1):
    """Returns the rows of the first alarms of the named checks, which are called after every ``every``th row."""
    first = {}
    for name in names:
        start, raises = COMPARING[name]
        tested = range(start, runs["reward"].shape[1] + 1, every)
        first[name] = first_rows([raises(runs, n) for n in tested], tested)
    return first


def checked(runs, names):
    """Returns the rows of the first alarms of the named checks, which are called after every row of every run."""
    count, rows = runs["reward"].shape
    first = {name: np.full(count, np.inf) for name in names}
    for i in range(count):
        logged = [{key: float(values[i, t]) for key, values in runs.items()} for t in range(rows)]
        for name in names:
            check = alarms.CHECKS[name]
            first[name][i] = next((n for n in range(1, rows + 1) if check(logged[:n])), np.inf)
    return first


def false_alarms(runs, rows, kind, *, seed=0, learns=True):
    """Returns the share of healthy runs in which each check raises an alarm. 1,000 rows are tested at every fourth."""
    made = healthy(np.random.default_rng(seed), runs, rows, kind, learns=learns)
    first = compared(made, COMPARING, every=4 if rows > 200 else 1) | checked(made, THRESHOLDS)
    return {name: float(np.isfinite(row).mean()) for name, row in first.items()}


def after(t, onset):
    """Returns the number of faulty rows up to and including each row."""
    return np.maximum(t - onset + 1, 0)


FAULTS = {
    # name of the check, fault: function of (runs, rows since the onset) that changes the metrics
    ("not_finite", "the reward is NaN"): lambda m, k: {"reward": np.where(k > 0, np.nan, m["reward"])},
    ("negative_kl", "the KL changes its sign"): lambda m, k: {"kl": np.where(k > 0, -m["kl"], m["kl"])},
    ("first_ratio", "ratios are wrong by 2 %"): lambda m, k: {"first_ratio_error": np.where(k > 0, 0.02, 1e-6)},
    ("large_ratios", "ratios grow 20-fold"): lambda m, k: {"ratio_max": m["ratio_max"] * np.where(k > 0, 20, 1)},
    ("sampler_gap", "another temperature"): lambda m, k: {"sampler_gap": np.where(k > 0, 0.3, 1e-6)},
    ("entropy_collapse", "entropy falls by 30 % per row"): lambda m, k: {"entropy": m["entropy"] * 0.7**k},
    ("equal_rewards", "all rewards are equal"): lambda m, k: {"training_reward_std": np.where(k > 0, 0, 1.0)},
    ("unfinished_answers", "40 % of answers lack a stop token"): lambda m, k: {
        "stopped": m["stopped"] - 0.4 * (k > 0)
    },
    ("reward_below_start", "the reward falls instead of rising"): lambda m, k: {"reward": -m["reward"]},
    ("overoptimised", "gold loses its whole gain at once"): lambda m, k: {
        "gold": m["gold"] - 0.16 * (k > 0), "reward": m["reward"] + 0.01 * k
    },
    ("overoptimised", "gold falls by 1 sd of the noise per row"): lambda m, k: {
        "gold": m["gold"] - 0.01 * k, "reward": m["reward"] + 0.01 * k
    },
    ("overoptimised", "gold falls by 0.1 sd per row"): lambda m, k: {
        "gold": m["gold"] - 0.001 * k, "reward": m["reward"] + 0.01 * k
    },
    ("overfitted", "the validation loss rises by 5 sd per measurement"): lambda m, k: {
        "validation_loss": m["validation_loss"] + 0.05 * k
    },
    ("overfitted", "the validation loss rises by 1 sd per measurement"): lambda m, k: {
        "validation_loss": m["validation_loss"] + 0.01 * k
    },
    ("overfitted", "the validation loss jumps by 20 sd"): lambda m, k: {
        "validation_loss": m["validation_loss"] + 0.2 * (k > 0)
    },
}  # fmt: skip


def delays(runs, name, fault, *, onset, rows, kind="0.5", seed=0):
    """Returns the number of faulty rows that each run has when the alarm is raised; infinity if it is missed."""
    made = healthy(np.random.default_rng(seed), runs, rows, kind)
    changed = FAULTS[name, fault](made, after(np.arange(rows), onset))
    made |= {key: np.broadcast_to(values, (runs, rows)) for key, values in changed.items()}
    first = compared(made, (name,))[name] if name in COMPARING else checked(made, (name,))[name]
    return np.where(first > onset, first - onset, np.inf)


def jump_delays(runs, sd, *, onset, rows, kind="0.5", seed=0):
    """Returns the delays with which a single rise of the validation loss by ``sd`` of its noise is detected."""
    made = healthy(np.random.default_rng(seed), runs, rows, kind)
    made["validation_loss"] = made["validation_loss"] + 0.01 * sd * (np.arange(rows) >= onset)
    first = compared(made, ("overfitted",))["overfitted"]
    return np.where(first > onset, first - onset, np.inf)


def test_the_simulation_agrees_with_the_checks_row_by_row():
    for fault in ("gold falls by 1 sd of the noise per row", "the validation loss jumps by 20 sd"):
        name = next(name for name, each in FAULTS if each == fault)
        made = healthy(np.random.default_rng(0), 2, 48, "0.5")
        made |= FAULTS[name, fault](made, after(np.arange(48), 24))
        np.testing.assert_array_equal(compared(made, (name,))[name], checked(made, (name,))[name])
    made["reward"] = -made["reward"]
    names = ("reward_below_start",)
    np.testing.assert_array_equal(compared(made, names)["reward_below_start"], checked(made, names)[names[0]])


def test_few_healthy_runs_raise_no_alarm():
    assert not any(false_alarms(20, 40, "0.5").values())
    made = healthy(np.random.default_rng(1), 100, 200, "0.5")
    assert not any(np.isfinite(row).any() for row in compared(made, COMPARING, every=4).values())


@pytest.mark.parametrize(
    ("name", "fault", "limit"),
    [
        ("reward_below_start", "the reward falls instead of rising", 21),
        ("overoptimised", "gold loses its whole gain at once", 10),
        ("overoptimised", "gold falls by 1 sd of the noise per row", 15),
        ("overfitted", "the validation loss rises by 5 sd per measurement", 8),
        ("overfitted", "the validation loss jumps by 20 sd", 6),
    ],
)
def test_strong_faults_are_detected_within_few_rows(name, fault, limit):
    onset = 0 if name == "reward_below_start" else 20
    assert np.mean(delays(40, name, fault, onset=onset, rows=onset + 40) <= limit) >= 0.85


@pytest.mark.slow
@pytest.mark.parametrize("kind", NOISES)
def test_fewer_than_one_healthy_run_in_a_hundred_raises_an_alarm(kind):
    for rows, runs in ((40, 600), (200, 400), (1000, 300)):
        rates = false_alarms(runs, rows, kind)
        assert max(rates.values()) < 0.01, (rows, rates)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "fault", "onset", "limit"),
    [
        *((name, fault, 20, 1) for name, fault in FAULTS if name in ("not_finite", "first_ratio", "sampler_gap")),
        ("negative_kl", "the KL changes its sign", 20, 2),
        *((name, fault, 20, 3) for name, fault in FAULTS if name in ("equal_rewards", "unfinished_answers")),
        ("large_ratios", "ratios grow 20-fold", 20, 5),
        ("entropy_collapse", "entropy falls by 30 % per row", 20, 9),
        ("reward_below_start", "the reward falls instead of rising", 0, 23),
        ("overoptimised", "gold loses its whole gain at once", 100, 15),
        ("overoptimised", "gold falls by 1 sd of the noise per row", 100, 16),
        ("overoptimised", "gold falls by 0.1 sd per row", 100, 92),
        ("overfitted", "the validation loss rises by 5 sd per measurement", 20, 8),
        ("overfitted", "the validation loss rises by 1 sd per measurement", 20, 13),
        ("overfitted", "the validation loss jumps by 20 sd", 20, 6),
    ],
)
def test_faults_are_detected_within_the_documented_number_of_rows(name, fault, onset, limit):
    rows = onset + max(40, limit + 10)
    assert np.mean(delays(200, name, fault, onset=onset, rows=rows) <= limit) >= 0.95


@pytest.mark.parametrize(("sd", "onset", "rows", "limit"), [(20, 8, 16, 5), (30, 3, 8, 5)])
def test_a_jump_is_detected_although_there_are_few_measurements(sd, onset, rows, limit):
    assert np.mean(jump_delays(300, sd, onset=onset, rows=rows) <= limit) >= 0.93


def test_few_measurements_of_healthy_runs_raise_no_alarm():
    """The test for a jump is repeated while there are 6 to 31 measurements, also if the validation loss is constant."""
    for seed, kind in enumerate(NOISES):
        made = healthy(np.random.default_rng(seed), 2000, 31, kind)
        assert not np.isfinite(compared(made, ("overfitted",))["overfitted"]).any()
    made = healthy(np.random.default_rng(5), 4000, 31, "0.5", learns=False)
    assert np.isfinite(compared(made, ("overfitted",))["overfitted"]).mean() < 0.01


def test_a_jump_that_does_not_last_raises_no_alarm():
    values = np.random.default_rng(0).normal(size=(500, 12))
    for rows, size in (([4], 50.0), ([4, 5], 50.0), ([10], -50.0), ([11], -50.0), ([10, 11], -50.0)):
        fall = falls.jump(values + size * np.isin(np.arange(12), rows))
        assert not (fall.size > fall.bound).any()
    fall = falls.jump(values - 50.0 * (np.arange(12) >= 9))
    assert (fall.size > fall.bound).all() and (fall.reference <= 6).all() and fall.window == 3


def test_a_jump_is_measured_between_the_nearest_rows():
    values = np.array([7.0, 9.0, 9.5, 10.0, 4.0, 3.0, 2.0])
    fall = falls.jump(values)
    assert (fall.size, fall.reference) == (9.0 - 4.0, 1)
    # Absolute second differences are 1.5, 0, 6.5, 5 and 0; the two largest are left out.
    assert fall.bound == pytest.approx(5.5 * (1 + 5 / 7) * 0.5)
    assert falls.jump(values, factor=2.0).bound == pytest.approx(2 * fall.bound)
    assert falls.jump(np.stack([values, -values])).size.tolist() == [5.0, -7.5]
    for rows in (5, 32):
        with pytest.raises(ValueError, match="from 6 to 31 rows"):
            falls.jump(np.zeros(rows))


def test_the_noise_of_a_window_is_that_of_the_autocorrelation():
    """In long series, the estimate approaches the true standard deviation, whatever the autocorrelation."""
    rng = np.random.default_rng(0)
    for rho in (0.0, 0.5, 0.8):
        values = noise(rng, 40, 2000, rho)
        averages = falls.means(values, 8)
        true = np.std(averages[:, ::80]) * math.sqrt(2)
        assert np.mean(falls.noise(values, 8)) == pytest.approx(true, rel=0.15)


def test_the_mean_of_a_window_leaves_out_its_extremes():
    values = np.array([1.0, 2.0, 90.0, 3.0, 4.0])
    np.testing.assert_allclose(falls.means(values, 4), [2.5, 3.5])
    np.testing.assert_allclose(falls.means(values, 2), [1.5, 46.0, 46.5, 3.5])
    with pytest.raises(ValueError, match="from 5 rows on"):
        falls.measure(values[:4])
