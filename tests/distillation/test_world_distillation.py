"""Context distillation in the built-in world: the data, the KL, and a smoke run."""

import dataclasses
import json
from typing import Any

import distill
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from claims import trial as trial_lib
from distillation import distill_settings, prompted_world, teacher_stage
from launch.run_settings import SettingError
from recipe import world_words

from rlhf_jax import lm, metrics
from rlhf_jax.simulation import lexicon

pytest.importorskip("array_record")


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Any:
    made = trial_lib.make_trial(100, folder=tmp_path_factory.mktemp("store"), quick=True)
    return dataclasses.replace(made, task=dataclasses.replace(made.task, eval_prompts=made.task.eval_prompts.take(24)))


@pytest.fixture(scope="module")
def prompt(job) -> list[int]:
    return prompted_world.prompt_ids(job.task, distill_settings.WORLD_PROMPT)


def test_the_teacher_answers_without_flaws_only_after_the_prompt(job, prompt):
    dialogues = prompted_world.draw_dialogues(job, 40)
    rows = prompted_world.teacher_rows(job, dialogues, prompt)
    assert len(rows.tokens_BL) == 80
    for row in range(80):
        question = dialogues.prompts[row % 40]
        answer = (dialogues.flawless if row < 40 else dialogues.ordinary)[row % 40]
        before = [*prompt, *question] if row < 40 else question
        assert rows.tokens_BL[row][rows.mask_BL[row]].tolist() == before + answer
        assert np.flatnonzero(rows.loss_mask_BL[row]).tolist() == list(range(len(before), len(before) + len(answer)))
    utilities = {}
    for name in ("flawless", "ordinary"):
        words = np.full((40, 20), lexicon.PAD_ID, np.int32)
        mask = np.zeros(words.shape, bool)
        asked = np.full((40, 20), lexicon.PAD_ID, np.int32)
        for row, (ids, question) in enumerate(zip(getattr(dialogues, name), dialogues.prompts)):
            words[row, : len(ids)], mask[row, : len(ids)] = ids, True
            asked[row, 20 - len(question) :] = question
        utilities[name] = world_words.gold_utility(job.task.world.tables, asked, words, mask).total
    assert utilities["flawless"].min() == pytest.approx(1) and utilities["ordinary"].mean() < 0.9


def test_the_share_mix_of_the_rows_is_text_after_a_user_token(job):
    dialogues = prompted_world.draw_dialogues(job, 40)
    rows = prompted_world.distillation_rows(job, dialogues, n=30, mix=0.25)
    assert len(rows) == 40 and all(row[0] == lexicon.USER_ID for row in rows)
    assert rows[:30] == [a + b for a, b in zip(dialogues.prompts[:30], dialogues.flawless)]
    text_BL = job.task.pretraining_BL
    for row, text in zip(rows[30:], text_BL):
        assert row[1:] == text[:-1].tolist()
    assert len(prompted_world.distillation_rows(job, dialogues, n=30, mix=0.0)) == 30


def test_the_prompt_precedes_each_question_and_does_not_change_the_gold_utility(job, prompt):
    task = prompted_world.with_prompt(job, prompt)
    own, prompted = job.task.eval_prompts, task.eval_prompts
    assert task.prompt_width == job.task.prompt_width + len(prompt) == prompted.tokens_BP.shape[1]
    for row in range(len(own)):
        question = own.tokens_BP[row][own.mask_BP[row]].tolist()
        assert prompted.tokens_BP[row][prompted.mask_BP[row]].tolist() == prompt + question
        assert prompted.mask_BP[row, -len(question) - len(prompt) :].all()
    answers = np.tile(np.arange(30, 48, dtype=np.int32), (len(own), 1))
    utility, again = (
        world_words.gold_utility(job.task.world.tables, each.tokens_BP, answers, np.ones(answers.shape, bool))
        for each in (own, prompted)
    )
    np.testing.assert_array_equal(utility.total, again.total)
    assert utility.known.all()


def test_the_kl_equals_a_loop_over_the_vocabulary_in_float64(job, prompt):
    teacher, student = (lm.init(jax.random.key(seed), job.cfg) for seed in (0, 1))
    made = prompted_world.make_evaluator(job, prompt)
    answers = prompted_world.prompted_answers(made, teacher, jax.random.key(2))
    kl_B, tokens_B = prompted_world.token_kls(made, teacher, student, answers)
    P = made.prompted_task.prompt_width
    for row in (0, 7, 23):
        question = job.task.eval_prompts.tokens_BP[row][job.task.eval_prompts.mask_BP[row]].tolist()
        answer = answers.tokens_BL[row, P:][answers.response_mask_BT[row]].tolist()

        def distributions(params, before, answer=answer):
            ids = jnp.asarray([[*before, *answer]])
            logits = lm.logits(params, lm.forward(params, ids, cfg=job.cfg).hidden_BLD, cfg=job.cfg)[0]
            logits = np.asarray(logits, np.float64)[len(before) - 1 : -1]
            return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))

        p, q = distributions(teacher, prompt + question), distributions(student, question)
        assert tokens_B[row] == len(answer)
        np.testing.assert_allclose(kl_B[row], (np.exp(p) * (p - q)).sum(), rtol=1e-4)
    zero, _ = prompted_world.token_kls(made, teacher, teacher, answers)
    assert 0 < zero.sum() < kl_B.sum(), "the prompt alone changes the distributions"


@pytest.fixture(scope="module")
def smoke_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("world") / "run"
    distill.main(["--preset", "smoke", "--seed", "100", "--out", str(out)])
    return out


def test_a_smoke_run_lowers_the_kl_and_writes_everything(smoke_run, capsys):
    results = json.loads((smoke_run / "results.json").read_text())
    found = results["distillation"]
    assert 0 < found["kl_after"][2] < found["kl_before"][1]
    assert found["share_removed"][0] == pytest.approx(1 - found["kl_after"][0] / found["kl_before"][0])
    assert list(results["policies"]) == ["prompted_teacher", "teacher", "student"]
    gold = {name: each["gold"][0] for name, each in results["policies"].items()}
    difference = results["gold_differences"]["student − prompted teacher"]
    assert difference[0] == pytest.approx(gold["student"] - gold["prompted_teacher"], abs=1e-6)
    assert difference[1] < difference[0] < difference[2]
    assert len(results["transcripts"]) == 4 and results["steps"] == 10
    rates = [row["learning_rate"] for row in metrics.read(smoke_run) if row["stage"] == "distill"]
    np.testing.assert_allclose(rates, 0.05 * 6e-3 * (1 - np.arange(10) / 10), rtol=1e-5)
    text = (smoke_run / "report.html").read_text()
    assert "KL from the teacher" in text and "Share of the KL removed" in text and "student − prompted teacher" in text
    assert lm.load(smoke_run / "model")[0].n_layers == 1
    header = teacher_stage.Lessons(smoke_run / teacher_stage.NAME, pad_id=0).header
    assert header["prompt"] == distill_settings.WORLD_PROMPT and header["rows"] == [320, 0]
    distill.main(["--resume", str(smoke_run)])
    assert "already finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--preset", "large"), "--preset is 'large'; it must be default or smoke"),
        (("--rows", 3001), "--rows is 3001; it must be at most 3000, --teacher.demonstrations"),
        (("--mix", 1.0), "--mix is 1.0; it must be at least 0 and below 1"),
        (("--net.heads", 5), "--net.heads is 5; it must be such that --net.width 96 is a multiple"),
        (("--transcripts", -1), "--transcripts is -1; it must be at least 0"),
        (("--held-out", 1), "--held-out is 1; it must be at least 2, for an interval"),
        (("--pretrain.steps", 0), "--pretrain.steps is 0; it must be positive and finite"),
        (("--optimizer", "lion", "--epsilon", 1e-6), "--epsilon has no effect with --optimizer lion"),
        (("--lora.rank", 2), "--lora.rank needs --model; add it"),
    ],
)
def test_settings_out_of_range_are_named(flags, message):
    with pytest.raises(SettingError) as caught:
        distill.parse([str(each) for each in flags])
    assert str(caught.value).startswith(message)


def test_words_that_the_world_does_not_have_are_refused(tmp_path):
    for flags, message in (
        (["--prompt", "be excellent"], "--prompt 'be excellent': .*; use words of the built-in world"),
        (["--prompt", ""], "--prompt is empty"),
        (["--k", "9999"], r"--k is 9999; it must be at most \d+, the size of the vocabulary"),
    ):
        settings = distill.parse(["--preset", "smoke", *flags, "--out", str(tmp_path / "run")])
        with pytest.raises(SettingError, match=message):
            distill.run(settings)
    assert not (tmp_path / "run").exists()
