"""Runs of DPO and related losses: pairs from rankings and from rounds, every loss, and refused settings."""

import dataclasses
import itertools
import json
import math
import pathlib
import re
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import dpo as experiment
import dpo_vs_ppo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from launch import settings as settings_lib
from preferences import bandit_study, direct_alignment, direct_settings, ranked_dpo, study_results
from preferences import pairs as pairs_lib
from recipe import jobs, policy_sampling, tasks
from sweeps import run_grid

from rlhf_jax import checkpoint, lm, metrics, types
from rlhf_jax.train import loop
from rlhf_jax.train import state as state_lib

ROOT = pathlib.Path(__file__).parents[2]

P, T = 3, 4


class RecordedProgress:
    """A progress display that only records messages."""

    def __init__(self):
        self.texts = []

    def message(self, stage, text):
        self.texts.append(f"{stage}: {text}")

    def __getattr__(self, name):
        return lambda *_, **__: None


def ranked(seed=0, B=6, K=4):
    rng = np.random.default_rng(seed)
    where = np.arange(K)[None] < rng.integers(1, K + 1, size=(B, 1))
    where[0] = True
    tokens = rng.integers(1, 99, size=(B, K, P + T)).astype(np.int32)
    tokens[:, :, :P] = np.arange(B)[:, None, None]
    ranks = np.where(where, rng.integers(1, 4, size=(B, K)), 0)
    ranks[0] = [1, 2, 2, 3]
    answer = np.arange(T) < rng.integers(1, T + 1, size=(B, K, 1))
    mask = np.concatenate([np.ones((B, K, P), bool), answer], axis=-1) & where[..., None]
    return types.Comparisons(tokens, mask, ranks, where)  # pyright: ignore[reportArgumentType]


def test_rankings_become_all_pairs_that_differ_in_rank_with_the_better_answer_first():
    rows = ranked()
    got = pairs_lib.from_rankings(rows, prompt_width=P, per_prompt=0, seed=0)
    expected = []
    for b in range(len(rows.ranks_BK)):
        for i, j in itertools.permutations(range(4), 2):
            if rows.where_BK[b, i] and rows.where_BK[b, j] and rows.ranks_BK[b, i] < rows.ranks_BK[b, j]:
                expected.append((b, tuple(rows.tokens_BKL[b, i].tolist()), tuple(rows.tokens_BKL[b, j].tolist())))
    tokens = got.rows.tokens_BKL
    pairs = [(b, tuple(x.tolist()), tuple(y.tolist())) for b, (x, y) in zip(got.prompt_B.tolist(), tokens)]
    assert pairs == expected and sum(b == 0 for b, *_ in pairs) == 5  # six pairs of four answers, one of them a tie
    np.testing.assert_array_equal(got.rows.answer_BKC, got.rows.mask_BKL[..., P:])
    few = pairs_lib.from_rankings(rows, prompt_width=P, per_prompt=2, seed=0)
    assert all(np.sum(few.prompt_B == b) == min(2, np.sum(got.prompt_B == b)) for b in range(6))
    kept = {(b, tuple(x.tolist()), tuple(y.tolist())) for b, (x, y) in zip(few.prompt_B.tolist(), few.rows.tokens_BKL)}
    assert kept <= set(expected) and len(kept) == len(few)
    tied = rows.replace(ranks_BK=np.ones_like(rows.ranks_BK))  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(settings_lib.SettingError, match="no pairs"):
        pairs_lib.from_rankings(tied, prompt_width=P, per_prompt=2, seed=0)


def test_single_answers_come_with_mismatched_answers_to_other_prompts():
    pairs = pairs_lib.from_rankings(ranked(B=20), prompt_width=P, per_prompt=3, seed=0)
    got = pairs_lib.singles(pairs, prompt_width=P)
    n = len(pairs)
    np.testing.assert_array_equal(got.tokens_BKL[:n, 0], pairs.rows.tokens_BKL[:, 0])
    np.testing.assert_array_equal(got.tokens_BKL[n:, 0], pairs.rows.tokens_BKL[:, 1])
    np.testing.assert_array_equal(got.good_BK[:, 0], np.arange(2 * n) < n)
    crossed = got.mismatched
    np.testing.assert_array_equal(crossed.tokens_BKL[..., :P], got.tokens_BKL[..., :P])
    # Each prompt token is the index of its prompt, and the tokens of an answer identify its prompt.
    home = {tuple(row[0, P:].tolist()): int(row[0, 0]) for row in got.tokens_BKL}
    assert all(home[tuple(row[0, P:].tolist())] != int(row[0, 0]) for row in crossed.tokens_BKL)
    alone = pairs_lib.from_rankings(ranked(B=1), prompt_width=P, per_prompt=0, seed=0)
    with pytest.raises(settings_lib.SettingError, match="same prompt"):
        pairs_lib.singles(alone, prompt_width=P)


def test_rounds_pair_the_best_with_the_worst_answer_and_skip_ties():
    tokens = np.array([[7, i, 1] for i in (1, 2, 3, 4, 4, 4, 5, 6, 6)], np.int32)
    mask = np.ones((9, 3), bool)
    numbers = [np.zeros(9) for _ in range(4)]
    answers = policy_sampling.Answers(tokens, mask, mask[:, 1:], *numbers, gold=None)  # pyright: ignore[reportArgumentType]
    scores = np.array([[0.1, 0.9, 0.5], [1.0, 2.0, 3.0], [0.5, 0.5, 0.5]])
    got, left_out = pairs_lib.best_and_worst(answers, scores, prompt_width=1)
    np.testing.assert_array_equal(got.rows.tokens_BKL, [[[7, 2, 1], [7, 1, 1]]])
    assert got.prompt_B.tolist() == [0], (
        "the second prompt's best and worst answers are equal texts; the third prompt's scores are equal"
    )
    assert left_out == {"equal scores": 1, "one text": 1}
    # The lowest answer of the third prompt has the same text as its best; the second lowest differs.
    scores[2] = [0.5, 0.9, 0.1]
    got, left_out = pairs_lib.best_and_worst(answers, scores, prompt_width=1)
    np.testing.assert_array_equal(got.rows.tokens_BKL[1], [[7, 6, 1], [7, 5, 1]])
    assert got.prompt_B.tolist() == [0, 2] and left_out == {"equal scores": 0, "one text": 1}
    scores[1, 2] = np.nan
    with pytest.raises(loop.DivergedError, match=r"1 of 9 answers .* not finite; the first one answers prompt 1"):
        pairs_lib.best_and_worst(answers, scores, prompt_width=1)


# ------------------------------------------------------------------------------------------------ on the built-in world


def small(**changes):
    preset = settings_lib.preset("smoke")
    parts = {
        "net": dataclasses.replace(preset.net, layers=1, width=32, mlp=64, heads=2),
        "pretrain": dataclasses.replace(preset.pretrain, documents=400, steps=2),
        "sft": dataclasses.replace(preset.sft, demonstrations=16),
        "comparisons": dataclasses.replace(preset.comparisons, prompts=8, max_k=4),
        "ppo": dataclasses.replace(preset.ppo, iterations=2, batch=8),
        "evaluation": dataclasses.replace(preset.evaluation, prompts=8),
    }
    tiny = dataclasses.replace(preset, **parts)
    fields: Any = {f.name: getattr(tiny, f.name) for f in dataclasses.fields(tiny)}
    return experiment.DPOSettings(**(fields | {"batch": 8} | changes))


def job_in(folder, settings):
    job = jobs.make_job(
        settings,
        tasks.make_task(settings),
        model=None,
        checkpoints=lambda stage: checkpoint.Checkpoints(folder / "checkpoints" / stage),
        log=metrics.MetricLog(folder),
        progress=RecordedProgress(),
    )
    return job, direct_alignment.make_trainer(job, settings, folder)


def model(job, seed=0):
    return jax.jit(lambda key: lm.init(key, cfg=job.cfg))(jax.random.key(seed))


def random_pairs(job, seed=0, n=12):
    """Returns random pairs with the widths of the built-in world."""
    task, rng = job.task, np.random.default_rng(seed)
    tokens = rng.integers(1, 60, size=(n, 2, task.row_width)).astype(np.int32)
    tokens[:, 1, : task.prompt_width] = tokens[:, 0, : task.prompt_width]
    answer = np.arange(task.response_width) < rng.integers(1, task.response_width + 1, size=(n, 2, 1))
    mask = np.concatenate([np.ones((n, 2, task.prompt_width), bool), answer], axis=-1)
    return pairs_lib.Pairs(types.Preferences(tokens, mask, answer), np.arange(n))  # pyright: ignore


SHORT = ("kto",)


@pytest.mark.parametrize(
    "loss", [*SHORT, *(pytest.param(x, marks=pytest.mark.slow) for x in direct_alignment.LOSSES if x not in SHORT)]
)
def test_every_loss_trains_by_its_name_and_restores_a_finished_run(tmp_path, loss):
    job, trainer = job_in(tmp_path, small(loss=loss, epochs=4))
    start, pairs = model(job), random_pairs(job)
    policy = trainer.train(start, pairs, name="run", seed=0)
    rows = [row for row in metrics.read(tmp_path) if row["stage"] == "run"]
    assert len(rows) == 6 and all(math.isfinite(value) for name, value in rows[-1].items() if name != "stage")
    assert {"accuracy", "chosen_logprob", "rejected_logprob"} <= rows[0].keys()
    assert ("baseline" in rows[0]) == (loss == "kto") and trainer.train_step.traces == 1
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), policy, start)
    assert max(jax.tree.leaves(moved)) > 1e-6
    cached = tmp_path / "reference" / "run.npz"
    assert cached.exists() == (loss not in ("orpo", "simpo"))
    again = trainer.train(start, pairs, name="run", seed=0)
    jax.tree.map(np.testing.assert_array_equal, again, policy)
    assert not job.progress.texts
    if loss == "cdpo":
        trainer.train(start, pairs, name="other", seed=1, reference_file="run")
        assert not (tmp_path / "reference" / "other.npz").exists() and not job.progress.texts
        trainer.data(random_pairs(job, seed=1), start, name="run")
        assert len(job.progress.texts) == 1 and "do not match this run's data" in job.progress.texts[0]


@pytest.mark.slow
def test_rounds_sample_and_label_with_the_latest_policy_as_reference(tmp_path):
    job, trainer = job_in(tmp_path, small(learning_rate=0.01))
    start = model(job)
    reward = lm.with_head(jax.random.key(1), start, job.cfg)
    seen = []

    def judge(answers, samples, key):
        seen.append((answers.kl_B.copy(), samples))
        return answers.lengths_B + np.linspace(0, 0.5, len(answers.lengths_B))

    trained, train = [], direct_alignment.Trainer.train

    def recorded(self, start, pairs, **options):
        trained.append((start, options["reference"], pairs))
        return train(self, start, pairs, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(direct_alignment.Trainer, "train", recorded)
        prompts = job.task.rl_prompts
        options: Any = {"judge": judge, "name": "r", "seed": 0, "rounds": 2, "samples": 3}
        _, rounds = direct_alignment.iterate(trainer, start, reward, prompts, **options)
        assert trained[0][1] is start and trained[1][1] is trained[1][0] is not start
        direct_alignment.iterate(trainer, start, reward, prompts, **(options | {"name": "h"}), hold_reference=True)
        assert trained[3][1] is start is not trained[3][0]
    assert [s for _, s in seen] == [3] * 4 and len(seen[0][0]) == 3 * (len(prompts) // 2)
    assert abs(seen[0][0]).max() < 1e-3 < abs(seen[1][0]).max(), "the second round samples from the first's policy"
    first = trained[0][2]
    lengths = np.asarray(first.rows.answer_BKC).sum(axis=-1)
    assert (lengths[:, 0] >= lengths[:, 1]).all(), "the judge prefers longer answers"
    assert rounds[0].pairs == len(first)
    assert rounds[0].pairs + sum(rounds[0].left_out.values()) == len(prompts) // 2
    with pytest.raises(settings_lib.SettingError, match="all different answers to a prompt the same score"):
        equal: Any = options | {"judge": lambda answers, samples, key: np.zeros(len(answers.lengths_B)), "name": "e"}
        direct_alignment.iterate(trainer, start, reward, prompts, **equal)


def test_judges_of_the_built_in_world(tmp_path):
    job, _ = job_in(tmp_path, small())
    start = model(job)
    reward = lm.with_head(jax.random.key(1), start, job.cfg)
    prompts = job.task.rl_prompts.take(8)
    answers = run_grid.sample_answers(job, run_grid.StartModels(start, start, reward), prompts, start, seed=0)
    key = jax.random.key(0)
    np.testing.assert_array_equal(pairs_lib.reward_judge(answers, 4, key), answers.scores_B)
    np.testing.assert_array_equal(pairs_lib.gold_judge(answers, 4, key), answers.gold.total)
    ranked_by_labelers = pairs_lib.make_labeler_judge(job, 1e-4)(answers, 4, key).reshape(2, 4)
    assert set(np.unique(ranked_by_labelers)) <= {-1.0, -2.0, -3.0, -4.0}
    assert (ranked_by_labelers.max(axis=1) == -1).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--loss", "orpo", "--beta", "0.2"], "--beta has no effect with --loss orpo"),
        (["--label-smoothing", "0.1"], "--label-smoothing has no effect with --loss dpo"),
        (["--loss", "robust", "--label-smoothing", "0.5"], "--label-smoothing is 0.5; it must be .* below 0.5"),
        (["--beta", "0"], "--beta is 0.0; it must be above 0"),
        (["--learning-rate", "-1"], "--learning-rate"),
        (["--micro-batches", "7"], "--micro-batches is 7; it must divide 64, the number of rows per batch"),
        (["--rounds", "2", "--samples", "1"], "--samples is 1; it must be at least 2"),
        (["--data.path", "x.jsonl", "--rounds", "2", "--judge", "gold"], "--judge gold requires the built-in world"),
        (["--loss", "simpo", "--rounds", "2", "--hold-reference"], "--hold-reference has no effect with --loss simpo"),
        (["--ppo.kl-coef", "-1"], "--ppo.kl-coef"),
        (["--resume", "nowhere"], "nowhere"),
        (["--desirable-weight", "3"], "--desirable-weight has no effect with --loss dpo"),
        (["--samples", "8"], "--samples has no effect with --rounds 0"),
        (["--judge", "gold"], "--judge has no effect with --rounds 0"),
        (["--hold-reference"], "--hold-reference has no effect with --rounds 0"),
        (["--rounds", "2", "--pairs", "9"], "--pairs has no effect with --rounds 2"),
        (["--ppo.kl-coef", "9"], "--ppo.kl-coef has no effect on dpo.py"),
        (["--reward-model.heldout"], "--reward-model.heldout has no effect on dpo.py"),
        (["--published", "xu"], "--published xu selects settings of PPO"),
    ],
)
def test_invalid_settings_are_refused_by_flag(arguments, message):
    with pytest.raises(settings_lib.SettingError, match=message):
        experiment.parse(arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--betas", "0.1", "0.1"], "--betas"),
        (["--kl-coefs", "0"], "--kl-coefs"),
        (["--seeds", "0"], "--seeds"),
        (["--beta", "0.1"], "uses --betas"),
        (["--pairs", "4"], "--pairs has no effect on dpo_vs_ppo.py, whose DPO uses all pairs"),
        (["--loss", "simpo"], "--loss is 'simpo', but this study only runs dpo"),
        (["--reward-model.heldout"], "--reward-model.heldout has no effect on dpo_vs_ppo.py"),
        (["--ppo.kl-coef", "0.5"], "--ppo.kl-coef has no effect on dpo_vs_ppo.py"),
        (["--rounds", "3", "--bandit-pairs", "2"], "at most --bandit-pairs 2"),
    ],
)
def test_invalid_settings_of_the_study_are_refused_by_flag(arguments, message):
    with pytest.raises(settings_lib.SettingError, match=message):
        dpo_vs_ppo.parse(arguments)


def test_used_ppo_settings_are_accepted():
    ppo = ["--ppo.learning-rate", "1e-3", "--ppo.iterations", "3", "--ppo.batch", "64"]
    assert experiment.parse(["--preset", "smoke", *ppo, "--rounds", "2", "--samples", "8"]).ppo.batch == 64
    settings = dpo_vs_ppo.parse(["--published", "xu", "--ppo.clip", "0.1"])
    assert (settings.ppo.clip, settings.ppo.iterations) == (0.1, 18)


def test_a_batch_has_no_more_rows_than_the_data_and_unseen_rows_are_counted():
    def schedule(pairs, **changes):
        options: dict[str, Any] = {"batch": 8} | changes
        return tuple(direct_alignment.schedule(direct_settings.DirectSettings(**options), pairs))

    assert schedule(20) == (8, 2, 4) and schedule(20, epochs=2) == (8, 5, 0)
    assert schedule(5) == (5, 1, 0) and schedule(5, micro_batches=2) == (4, 1, 1)
    assert schedule(5, loss="kto") == (10, 1, 0)
    with pytest.raises(settings_lib.SettingError, match="8 needs at least 8 rows, but there are only 5; lower it"):
        schedule(5, micro_batches=8)


def test_the_policy_and_the_reward_model_have_the_same_pairs_by_default():
    rows, settings = ranked(), experiment.parse([])
    pairs = pairs_lib.from_rankings(rows, prompt_width=P, per_prompt=settings.pairs, seed=0)
    labelled = pairs_lib.count(rows)
    assert labelled == {"pairs": len(pairs), "answers": int(rows.where_BK.sum()), "prompts": 6}
    used = {"pairs": len(pairs), "prompts": 6, "sampled_answers": 0}
    data = experiment._training_data(settings, used, rows)
    assert data["dpo"]["pairs"] == data["reward_model"]["pairs"] and data["dpo"].keys() == data["reward_model"].keys()
    assert dpo_vs_ppo.parse([]).pairs == 0


def test_dpo_on_rankings_of_two_answers_is_dpo_on_pairs(tmp_path):
    job, trainer = job_in(tmp_path, small())
    start, pairs = model(job), random_pairs(job, n=8)
    data = trainer.data(pairs, start, name="pairs")
    rows, ranks_BK = pairs.rows, np.tile([1, 2], (8, 1))
    flip_B = np.arange(8) % 2 == 1
    tokens, mask = (
        np.where(flip_B[:, None, None], np.asarray(x)[:, ::-1], np.asarray(x)) for x in (rows.tokens_BKL, rows.mask_BKL)
    )
    ranks_BK = np.where(flip_B[:, None], ranks_BK[:, ::-1], ranks_BK)
    comparisons: Any = types.Comparisons(tokens, mask, ranks_BK, np.ones((8, 2), bool))  # pyright: ignore
    batch = ranked_dpo.with_reference(job, start, comparisons)
    expected = np.where(flip_B[:, None], data.reference_BK[:, ::-1], data.reference_BK)
    np.testing.assert_allclose(batch.loss_inputs["reference_K"], expected, rtol=1e-4, atol=1e-3)
    batch = batch.replace(loss_inputs=batch.loss_inputs | {"beta": np.full(8, 0.3, np.float32)})  # type: ignore
    hyper = direct_alignment.hyperparameters(dataclasses.replace(job.settings, beta=0.3), learning_rate=0.01)  # type: ignore
    moved, key = jax.tree.map(lambda x: 1.2 * x, start), jax.random.key(0)
    new = [state_lib.create(moved, job.ppo_tx) for _ in range(2)]
    one, logs = trainer.train_step(new[0], None, hyper, data, key)
    two, ranked_logs = ranked_dpo.make_step(job)(
        new[1], None, {"learning_rate": np.float32(0.01), "max_grad_norm": np.float32(1.0)}, batch, key
    )
    assert metrics.to_floats(ranked_logs)["loss"] == pytest.approx(metrics.to_floats(logs)["loss"], rel=1e-3)
    assert "accuracy" not in ranked_logs
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), one.params, two.params)


def test_dpo_on_rankings_weighs_all_pairs_of_a_prompt():
    rng = np.random.default_rng(0)
    logprobs, reference = rng.normal(size=(2, 4))
    ranks, where = np.array([2, 1, 2, 3]), np.array([True, True, True, False])
    better = [(i, j) for i in range(4) for j in range(4) if ranks[i] < ranks[j] and where[i] and where[j]]
    gaps = [0.3 * (logprobs[i] - reference[i] - logprobs[j] + reference[j]) for i, j in better]
    # The tied pair counts in the divisor, as in the reward model's loss.
    expected = sum(math.log1p(math.exp(-gap)) for gap in gaps) / 3
    loss = ranked_dpo._loss(*map(jnp.asarray, (logprobs, ranks)), where_K=where, reference_K=reference, beta=0.3)  # type: ignore
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_methods_of_the_study_have_equal_labels_and_iterated_dpo_the_answers_of_ppo(monkeypatch):
    settings = dpo_vs_ppo.parse(["--rounds", "2", "--seeds", "2", "--betas", "0.1", "--ppo.iterations", "2"])
    trained, iterated = [], []
    prompts = type("Prompts", (list,), {"take": lambda self, n: self[:n]})(range(900))
    job: Any = SimpleNamespace(task=SimpleNamespace(prompt_width=P, rl_prompts=prompts), ppo_step=None)
    monkeypatch.setattr(ranked_dpo, "with_reference", lambda job, reference, rows: rows)
    monkeypatch.setattr(ranked_dpo, "make_step", lambda job: None)
    monkeypatch.setattr(ranked_dpo, "train", lambda *args, **options: trained.append((args[3], options)))
    monkeypatch.setattr(dpo_vs_ppo.run_grid, "train", lambda *_, **__: None)
    monkeypatch.setattr(dpo_vs_ppo.run_grid, "prepare", lambda job: run_grid.StartModels(*"sdr"))
    monkeypatch.setattr(dpo_vs_ppo.comparison_data, "load_or_collect", lambda *_, **__: ([ranked(B=6)], None, {}))
    for name in ("pretrain", "train_reward_model", "normalise_scores"):
        monkeypatch.setattr(dpo_vs_ppo.stages, name, lambda *_, **__: None)
    monkeypatch.setattr(direct_alignment, "make_trainer", lambda *_: SimpleNamespace(devices=16))
    rounds = [SimpleNamespace(pairs=64), SimpleNamespace(pairs=60)]
    iterate = lambda *args, **options: iterated.append((args[3], options)) or (None, rounds)  # noqa: E731
    monkeypatch.setattr(direct_alignment, "iterate", iterate)
    methods, folder = [("DPO", (0.1,)), ("iterated DPO", (0.1,)), ("PPO", (0.1,))], SimpleNamespace(path=None)
    _, policies, data = dpo_vs_ppo._train_policies(job, settings, folder, methods)  # pyright: ignore
    assert (
        len(policies) == 6
        and len(iterated[0][0]) == 512 // 4
        and [options["beta"] for _, options in trained] == [0.1] * 2
    )
    assert [options["settings"].beta for _, options in iterated] == [0.2, 0.2]
    assert {options["settings"].epochs for _, options in iterated} == {4}
    labels = pairs_lib.count(ranked(B=6))
    for each in data.values():
        assert (each["labelled pairs"], each["labelled answers"]) == (labels["pairs"], labels["answers"])
    assert data["iterated DPO"]["sampled answers"] == data["PPO"]["sampled answers"] == 512
    assert [data[name]["steps"] for name in ("DPO", "iterated DPO", "PPO")] == [1, 4 + 5, 2 * 4], (
        "a batch of 60 pairs is 48 on 16 devices"
    )


def test_log_probabilities_have_the_temperature_of_the_policy(tmp_path):
    asked = experiment.parse(["--preset", "smoke", "--ppo.temperature", "0.5"])
    cfg = lm.LMConfig.preset("tiny")
    job: Any = SimpleNamespace(cfg=cfg, settings=asked, task=SimpleNamespace(prompt_width=3), mesh=None)
    params, tokens, mask = lm.init(jax.random.key(0), cfg), jnp.array([[5, 6, 7, 8, 9]]), jnp.ones((1, 5), bool)
    wanted = lm.token_logprobs(params, tokens, cfg=cfg, prompt_width=3, temperature=0.5).sum()
    assert float(ranked_dpo._make_score(job)(params, tokens, mask)[0]) == pytest.approx(float(wanted), rel=1e-5)
    rows = types.Preferences(tokens[:, None], mask[:, None], mask[:, None, 3:])
    scores_BK = direct_alignment.make_trainer(job, asked, tmp_path).score(params, rows)
    assert float(scores_BK[0, 0]) == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize("kind", [direct_settings.DirectSettings, experiment.DPOSettings, dpo_vs_ppo.StudySettings])
def test_every_setting_has_an_effect_and_a_help_text(kind):
    files = [
        pathlib.Path(module.__file__ or "") for module in (direct_settings, direct_alignment, experiment, dpo_vs_ppo)
    ]
    source = "".join(file.read_text() for file in files)
    shared = {field.name for field in dataclasses.fields(settings_lib.Settings)}
    for field in dataclasses.fields(kind):
        if field.name not in shared:
            assert re.search(rf'settings\.{field.name}\b|"{field.name}"', source), f"nothing reads {field.name}"
            assert re.search(rf'^    {field.name}: [^\n]*\n    """.+', source, re.MULTILINE), (
                f"{field.name} has no help"
            )


def test_every_setting_of_a_loss_reaches_its_step():
    def hyper(*arguments):
        return direct_alignment.hyperparameters(experiment.parse([*arguments]), learning_rate=0.5)

    simpo = hyper("--loss", "simpo", "--beta", "3", "--margin", "0.25")
    assert (simpo.beta, simpo.margin, simpo.learning_rate, simpo.max_grad_norm) == (3.0, 0.25, 0.5, 1.0)
    assert hyper("--loss", "cdpo").label_smoothing == np.float32(0.1) and hyper().label_smoothing == 0.0
    kto = hyper("--loss", "kto", "--desirable-weight", "1.5")
    assert (kto.desirable_weight, kto.undesirable_weight) == (1.5, 1.0)


def test_the_study_compares_shifted_pairs_at_one_coefficient_and_methods_at_equal_kl():
    def runs(*pairs):
        return [{"kl": kl, "gold": gold} for kl, gold in pairs]

    effects = study_results.effects(
        {
            "DPO": {0.1: runs((4.0, 0.9), (4.0, 1.0)), 0.2: runs((0.25, 0.6), (0.25, 0.7))},
            "DPO, shifted pairs": {0.2: runs((0.1, 0.5), (0.1, 0.5))},
            "iterated DPO": {0.2: runs((0.5, 0.8), (0.5, 1.0)), 0.4: runs((0.6, 0.8), (0.6, 1.0))},
            "PPO": {0.3: runs((1.0, 0.9), (1.0, 0.9)), 0.6: runs((0.0, 0.5), (0.01, 0.5))},
            "PPO, shifted pairs": {0.3: runs((1.0, 0.8), (1.0, 0.9))},
        },
        {"DPO": 0.2, "PPO": 0.3},
        (1.0, 9.0),
    )
    means = {name: each[0] for name, each in effects.items()}
    assert means == pytest.approx(
        {
            "gold that shifted pairs cost DPO": 0.15,
            "gold that shifted pairs cost PPO": 0.05,
            "what they cost DPO more than PPO": 0.1,
            "gold of PPO above DPO at a KL of 1": 0.15,  # interpolated in √KL, DPO has 0.7 and 0.8
        }
    )
    low, high = effects["gold that shifted pairs cost DPO"][1:]
    assert low < 0.15 < high


@pytest.mark.slow
def test_all_methods_approach_the_optimum_of_the_bandit_with_many_labels():
    results = bandit_study.run(coefs=(0.5, 1.0), seeds=2, pairs=20_000, rounds=2)
    assert list(results) == list(bandit_study.METHODS)
    for c in range(2):
        best = results["optimum"][c][0]
        for method in ("PPO", "DPO", "iterated DPO"):
            for each in results[method][c]:
                assert each["gold"] == pytest.approx(best["gold"], abs=0.12), method
                assert each["kl"] == pytest.approx(best["kl"], abs=0.25), method


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--loss", "kto", "--rounds", "2", "--judge", "labelers"]])
def test_the_command_runs_end_to_end_and_resumes(more, tmp_path):
    command = [sys.executable, str(ROOT / "experiments" / "dpo.py")]
    done = subprocess.run([*command, "--preset", "smoke", "--out", tmp_path, *more], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "results.json").read_text())
    assert (tmp_path / "report.html").exists() and (tmp_path / "policy" / "model.safetensors").exists()
    assert 0 <= results["implicit_accuracy"][0] <= 1 and results["programs"]["direct"] == 1
    assert len(results.get("rounds", [])) == (2 if more else 0)
    (tmp_path / "results.json").unlink()
    again = subprocess.run([*command, "--resume", tmp_path], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr[-3000:]
    second = json.loads((tmp_path / "results.json").read_text())
    same = ("policies", "implicit_accuracy", "programs")
    assert {name: second[name] for name in same} == {name: results[name] for name in same}
