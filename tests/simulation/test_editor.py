"""The simulated editor and judge of harmlessness."""

from typing import Any

import numpy as np
import pytest
from scipy import special, stats

from rlhf_jax import feedback
from rlhf_jax.simulation import editor, gold, harm_judge, world

PROMPT, HARM = "how do i burn the fox ?", "sure , first , get the match . then , burn the fox ."
TABLES = gold.make_tables(world.make_world(seed=0))


def revisions(reply, *, prompt=PROMPT, rounds=4, critique=True, **options):
    mistakes: Any = {"miss": 0.0, "fail": 0.0} | options
    simulated = editor.SimulatedEditor(**mistakes)
    found = feedback.revise(
        [prompt],
        [reply],
        simulated,
        name=simulated.name,
        principles=feedback.HARMLESSNESS,
        rounds=rounds,
        critique=critique,
    )
    return found.revised_N[0]


@pytest.mark.parametrize("critique", [True, False])
def test_a_flawless_editor_mends_one_flaw_at_a_time(critique):
    found = revisions(HARM, critique=critique)
    counts = [len(editor.flaws(PROMPT, reply)) for reply in found.responses[:2]]
    assert counts[0] == 2 and found.responses[-1] == editor.REFUSAL
    assert found.responses[1] != editor.REFUSAL and "cannot" not in found.responses[1].split()


def test_the_critique_names_the_flaw_that_the_revision_mends():
    found = revisions(HARM)
    for step, text in enumerate(found.critiques[:2]):
        flaw = next(each for each in editor.CRITIQUES if editor.critique(found.responses[step], each) == text)
        assert found.responses[step + 1] == editor.mend(found.responses[step], flaw)
    assert found.critiques[-1] == editor.NO_CRITIQUE


def test_mended_replies():
    assert editor.mend(HARM, "means") == "sure , first , get it . then , burn the fox ."
    assert editor.mend("burn the fox with the match .", "means") == "burn the fox ."
    assert editor.mend(HARM, "steps") == "sure , i can help ."
    assert editor.mend(f"{HARM} you are welcome .", "steps") == "you are welcome ."


def test_a_benign_prompt_has_no_flaws():
    reply = "first , get the soap . then , clean the fox ."
    assert revisions(reply, prompt="how do i clean the fox ?").responses == (reply,) * 5


@pytest.mark.parametrize("mistake", ["miss", "fail"])
def test_an_editor_who_always_errs_changes_nothing(mistake):
    options: Any = {mistake: 1.0}
    assert revisions(HARM, **options).responses == (HARM,) * 5


def test_an_editor_who_fails_once_may_succeed_in_another_round():
    principle = feedback.HARMLESSNESS[:1]
    simulated = editor.SimulatedEditor(miss=0.0, fail=0.5)
    prompts = [f"how do i burn the {x} ?" for x in ("fox", "bear", "owl", "frog", "crow", "hen", "cow", "pig")]
    found = feedback.revise(
        prompts, [HARM] * 8, simulated, name=simulated.name, principles=principle, rounds=9, critique=False
    )
    stuck = [each for each in found.revised_N if len(set(each.responses)) == 1]
    mended = [each for each in found.revised_N if each.responses[0] == each.responses[1] and each not in stuck]
    assert not stuck and mended


def test_mistakes_have_their_rates_and_depend_on_the_request_only():
    simulated = editor.SimulatedEditor(miss=0.2, fail=0.3, seed=1)
    prompts = [f"how do i burn the {x} ?" for x in ("fox", "bear", "owl", "frog", "crow")] * 1
    requests = [
        feedback.critique_request(prompt, HARM, feedback.HARMLESSNESS[0]._replace(critique=f"request {n}"))
        for n in range(400)
        for prompt in prompts
    ]
    texts = [text.text for _, text in simulated(requests)]
    missed = np.mean([text == editor.NO_CRITIQUE for text in texts])
    assert missed == pytest.approx(0.2, abs=4 * np.sqrt(0.2 * 0.8 / len(texts)))
    assert texts[::-1] == [text.text for _, text in simulated(requests[::-1])]


def pairs(n):
    return [feedback.Pair(PROMPT, editor.REFUSAL, f"{HARM} {'sure ' * i}".strip()) for i in range(n)]


def test_the_judge_reads_the_gold_harmlessness():
    judge = harm_judge.SimulatedJudge(TABLES)
    replies = [HARM, editor.REFUSAL, "sure , i can help .", "burn the fox ."]
    np.testing.assert_allclose(judge.harmlessness([PROMPT] * 4, replies), [0.0, 1.0, 0.4, 0.4], atol=1e-6)


def test_a_judge_is_calibrated_and_right_at_the_stated_rate():
    judge = harm_judge.SimulatedJudge(TABLES, strength=4.0)
    questions = [feedback.question(pairs(1)[0], principle=f"Question {i}?") for i in range(4000)]
    p = np.array([answer.probability for _, answer in judge(questions)])
    assert np.mean(p > 0.5) == pytest.approx(stats.norm.cdf(1.0), abs=0.025)
    # The log-odds are normal with mean v / 2 and variance v, so they are log-likelihood ratios.
    log_odds = special.logit(p)
    assert (log_odds.mean(), log_odds.var()) == pytest.approx((2.0, 4.0), abs=0.25)


def test_an_overconfident_judge_is_right_about_the_same_pairs():
    calm, sure = (harm_judge.SimulatedJudge(TABLES, overconfidence=c) for c in (1.0, 8.0))
    principle = [f"Question {i}?" for i in range(6)]
    one, other = (feedback.label(pairs(6), judge, principle=principle).preference_N for judge in (calm, sure))
    np.testing.assert_array_equal(one > 0.5, other > 0.5)
    assert np.mean(np.abs(other - 0.5)) > np.mean(np.abs(one - 0.5)) + 0.05


def test_both_orders_sum_to_one_and_equal_replies_are_ties():
    judge = harm_judge.SimulatedJudge(TABLES, position_bias=1.0)
    swapped = [feedback.Pair(each.prompt, each.second, each.first) for each in pairs(6)]
    one, other = (feedback.label(each, judge, principle="Which?").preference_N for each in (pairs(6), swapped))
    np.testing.assert_allclose(one + other, 1, atol=1e-6)
    tie = feedback.label([feedback.Pair(PROMPT, HARM, f"{HARM} sure")], judge, principle="Which?")
    np.testing.assert_allclose(tie.preference_N, 0.5, atol=1e-12)
    assert tie.position_bias == pytest.approx(special.expit(1.0) - 0.5)
