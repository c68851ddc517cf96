"""Labels of the two domains, rounds of online RLHF, and hh.py, which resumes bit-identically after a kill."""

import dataclasses
from typing import Any

import hh
import jax
import killed_run
import numpy as np
import pytest
from launch.settings import SettingError
from online import comparison_sets, domains, policies, preference_models, rounds

from rlhf_jax import types
from rlhf_jax.simulation import labelers

HARMLESS, CORRECT = (labelers.FEATURES.index(name) for name in ("harmless", "correct"))


def pool(**options):
    return labelers.make_pool(jax.random.key(0), 8, **{"spread": 0.0, "lapse": 0.0, "tie_width": 0.01, **options})


def features(pairs, feature):
    """Returns features of pairs that differ in one feature only."""
    features_B2F = np.zeros((len(pairs), 2, len(labelers.FEATURES)))
    features_B2F[:, :, feature] = pairs
    return features_B2F


def empty(n: int) -> Any:
    """Returns n pairs without tokens."""
    arrays: Any = (np.zeros((n, 2, 4)), np.zeros((n, 2, 4)), np.ones((n, 2)), np.ones((n, 2)))
    return types.Comparisons(*arrays)


def test_each_domain_compares_only_what_it_asks_for():
    both = features([(1, 0)] * 4, HARMLESS)
    both[:, :, CORRECT] = [(0, 1)] * 4  # the more harmful answer is the more correct one
    key = jax.random.key(1)
    helpful, harmless = (
        domains.label(key, pool(), both, domain=domain, temperature=1e-3) for domain in ("helpful", "harmless")
    )
    assert not helpful.first_is_better_B.any() and harmless.first_is_better_B.all()


def test_pairs_that_the_labeler_finds_equal_are_discarded():
    found = domains.label(
        jax.random.key(1), pool(), features([(1, 1), (1, 0), (0.4, 0.4)], HARMLESS), domain="harmless", temperature=0.1
    )
    assert found.kept_B.tolist() == [False, True, False]
    rows = empty(3)
    kept = comparison_sets.with_labels(rows, found, domain="harmless")
    assert kept.ranks_BK.tolist() == [[1, 2]] and kept.domain_B.tolist() == [1]


@pytest.mark.parametrize(("lapse", "expected"), [(0.0, 1 / (1 + np.exp(-1.5))), (0.4, 0.6 / (1 + np.exp(-1.5)) + 0.2)])
def test_choices_follow_bradley_terry_and_lapse(lapse, expected):
    n, temperature = 40_000, 0.2
    gap = 1.5 * temperature / float(pool().weights_RF[0, HARMLESS])
    found = domains.label(
        jax.random.key(2),
        pool(lapse=lapse),
        features([(gap, 0)] * n, HARMLESS),
        domain="harmless",
        temperature=temperature,
    )
    assert np.mean(found.first_is_better_B) == pytest.approx(expected, abs=4 * 0.5 / np.sqrt(n))


def test_both_answers_of_a_pair_belong_to_its_prompt_and_come_from_any_answerer():
    prompts: Any = FakePrompts(np.arange(200))
    answerers: Any = [answerer(source) for source in (1, 2, 3)]
    rows, features_B2F = comparison_sets.sample_pairs(answerers, prompts, jax.random.key(0), width=4)
    assert (np.asarray(rows.tokens_BKL)[:, :, 0] == np.arange(200)[:, None]).all()
    sources = np.asarray(rows.tokens_BKL)[:, :, 1]
    assert {1, 2, 3} == set(sources.ravel()) and len({tuple(pair) for pair in sources}) == 9
    assert (features_B2F[:, :, HARMLESS] == sources).all()


@dataclasses.dataclass
class FakePrompts:
    """Prompts that are numbers."""

    numbers: np.ndarray

    def __len__(self):
        return len(self.numbers)

    def at(self, rows):
        return FakePrompts(self.numbers[rows])


class FakeAnswers:
    """Answers whose tokens are the prompt's number, the source, and whose harmlessness is the source."""

    def __init__(self, numbers, source):
        n = len(numbers)
        self.tokens_BL = np.stack([numbers, np.full(n, source), np.zeros(n), np.zeros(n)], axis=1)
        self.mask_BL = np.ones((n, 4), bool)
        self.gold = source * np.ones(n)


def answerer(source):
    return lambda prompts, key: FakeAnswers(prompts.numbers, source)


@pytest.fixture(autouse=True)
def fake_features(monkeypatch):
    real = labelers.features

    def of(gold):
        return features(gold[:, None], HARMLESS)[:, 0] if isinstance(gold, np.ndarray) else real(gold)

    monkeypatch.setattr(labelers, "features", of)


def test_the_first_pairs_of_each_domain_are_taken_and_a_shortage_is_an_error():
    tokens = np.arange(6)[:, None, None] * np.ones((6, 2, 4))
    rows: Any = dataclasses.replace(empty(6), tokens_BKL=tokens, domain_B=np.array([1, 0, 0, 1, 1, 0]))
    found: Any = comparison_sets.first(rows, {"helpful": 2, "harmless": 1})
    assert found.tokens_BKL[:, 0, 0].tolist() == [1, 2, 0] and found.domain_B.tolist() == [0, 0, 1]
    with pytest.raises(ValueError, match="the harmless domain has 3 pairs, not 4"):
        comparison_sets.first(rows, {"helpful": 2, "harmless": 4})


def test_elo_counts_wins_on_equal_prompts_and_ties_as_half():
    first = np.array([1.0, 1.0, 1.0, 0.0, 0.5, 0.5])
    second = np.array([0.0, 0.0, 0.0, 1.0, 0.5, 0.5])
    found = policies.elo([first, second], np.arange(6))
    assert found.difference(0, 1).mean == pytest.approx(np.log(4 / 2))  # 3 wins, 1 loss and 2 ties


def test_a_weight_of_harmlessness_is_that_of_each_pair():
    rows = empty(4)
    rows = dataclasses.replace(rows, domain_B=np.array([0, 0, 0, 1]))
    # Three helpfulness pairs and one harmlessness pair: 3/4 of one mean loss and 3 * 1/4 of the other.
    np.testing.assert_allclose(preference_models.domain_weights(rows, 3.0), [0.75, 0.75])


# --------------------------------------------------------------------------------------------------------- the command

TINY = {
    "net.layers": 1, "net.width": 16, "net.heads": 2, "net.mlp": 16,
    "pretrain.documents": 200, "pretrain.steps": 4, "pretrain.batch": 8,
    "sft.demonstrations": 32, "sft.mix-epochs": 1,
    "ppo.iterations": 4, "ppo.batch": 16, "ppo.minibatches": 2, "ppo.warmup": 1,
    "evaluation.prompts": 64, "online.pairs": 32, "online.held-out": 24, "online.rejection": 2, "pm.batch": 8,
}  # fmt: skip
ARGUMENTS = ["--preset", "smoke", *(text for name, value in TINY.items() for text in (f"--{name}", str(value)))]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, killed_run.run("hh.py", "--out", folder, *ARGUMENTS)


def test_results_have_every_policy_set_and_preference_model(finished):
    folder, printed = finished
    results = killed_run.results_of(folder)
    names = [rounds.START, "round 1", "round 2", "round 3", rounds.STATIC]
    assert list(results["policies"]) == names
    for criterion in ("helpful", "harmless", "overall"):
        assert results["elo"][criterion][rounds.START] == [0, 0, 0]
        mean, low, high = results["iterated_minus_static_elo"][criterion]
        assert low <= mean <= high
        last, static = (results["elo"][criterion][name][0] for name in ("round 3", rounds.STATIC))
        assert mean == pytest.approx(last - static)
    assert [each["source"] for each in results["sets"]] == ["base", "rejection", "online"]
    assert len({each["labeler_temperature"] for each in results["sets"]}) == 1, "labelers are the same in all rounds"
    assert results["static_pairs"] <= sum(each["pairs"] for each in results["sets"])
    assert list(results["preference_models"]) == names[1:]
    assert "Elo of the last round's policy" in printed
    for name in ("policy", "preference_model", "sft_mix"):
        assert (folder / name / "model.safetensors").exists()
    assert "</svg>" in (folder / "report.html").read_text()


@pytest.mark.parametrize(
    "stage",
    ["ppo-2b", *(pytest.param(each, marks=pytest.mark.slow) for each in (
        "sft_mix", "comparisons-1", "reward_model-1", "ppo-1a", "comparisons-2", "comparisons-3", "ppo-3b",
        "comparisons-100", "reward_model-static", "ppo-staticb"))],
)  # fmt: skip
def test_a_run_killed_in_any_round_resumes_bit_identically(finished, tmp_path, stage):
    folder, _ = finished
    killed = tmp_path / "run"
    killed_run.run_and_kill("hh.py", *ARGUMENTS, folder=killed, when=killed_run.in_stage(stage))
    killed_run.run("hh.py", "--resume", killed)
    assert killed_run.results_of(killed) == killed_run.results_of(folder)
    assert (killed / "metrics.jsonl").read_text() == (folder / "metrics.jsonl").read_text()
    weights = [(each / "policy" / "model.safetensors").read_bytes() for each in (killed, folder)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--online.sets", "online", "base"], "the first set must be base"),
        (["--online.red-team", "1"], "--online.red-team"),
        (["--pm.score-weights", "1", "2"], "--pm.score-weights has no effect without --pm.separate"),
        (["--data.path", "pairs.jsonl"], "--data.path is not supported by hh.py"),
        (["--comparisons.prompts", "12"], "--comparisons.prompts has no effect on hh.py"),
        (["--online.snapshots", "99"], "--online.snapshots"),
    ],
)
def test_settings_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(SettingError, match=message):
        hh.parse(arguments)


@pytest.mark.parametrize("preset", ["default", "smoke"])
def test_the_kl_coefficient_is_small_unless_a_paper_or_a_flag_sets_it(preset):
    assert hh.parse(["--preset", preset]).ppo.kl_coef == 0.01
    assert hh.parse(["--preset", preset, "--ppo.kl-coef", "0.1"]).ppo.kl_coef == 0.1
    assert hh.parse(["--preset", preset, "--published", "instructgpt"]).ppo.kl_coef == 0.02
