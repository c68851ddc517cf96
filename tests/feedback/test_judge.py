"""Labels of a judge: both orders, the stored answers, the budget, and a model as judge."""

import json

import jax
import numpy as np
import pytest

from rlhf_jax import feedback, lm
from rlhf_jax.diagnostics import wilson

PAIRS = [feedback.Pair(f"question {i}", f"good {i}", f"bad {i}") for i in range(10)]
PRINCIPLE = "Which reply is better?"


class FakeJudge:
    """Answers by a function of the question, and remembers what it was asked."""

    def __init__(self, answer, name="fake"):
        self.answer, self.name, self.questions = answer, name, []

    def __call__(self, questions):
        for i, text in reversed(list(enumerate(questions))):
            self.questions.append(text)
            yield i, self.answer(text)


def prefers_good(text):
    return feedback.Answer(0.9 if text.index("good") < text.index("bad") else 0.2, tokens=3)


def test_preferences_of_both_orders_sum_to_one():
    swapped = [feedback.Pair(pair.prompt, pair.second, pair.first) for pair in PAIRS]
    rng = np.random.default_rng(0)
    answers = {}

    def random(text):
        return answers.setdefault(text, feedback.Answer(float(rng.uniform())))

    one, other = (feedback.label(each, FakeJudge(random), principle=PRINCIPLE) for each in (PAIRS, swapped))
    np.testing.assert_allclose(one.preference_N + other.preference_N, 1, atol=1e-12)


def test_the_preference_is_the_mean_of_both_orders():
    labels = feedback.label(PAIRS, FakeJudge(prefers_good), principle=PRINCIPLE)
    np.testing.assert_allclose(labels.preference_N, (0.9 + 1 - 0.2) / 2)
    assert labels.position_bias == pytest.approx((0.9 + 0.2) / 2 - 0.5)
    assert (labels.asked, labels.stored, labels.tokens) == (20, 0, 60)


@pytest.mark.parametrize("probability", [1.0, 0.7, 0.6224593312018546, 0.0])
def test_a_judge_that_only_sees_the_place_gives_ties(probability):
    labels = feedback.label(PAIRS, FakeJudge(lambda text: feedback.Answer(probability)), principle=PRINCIPLE)
    np.testing.assert_array_equal(labels.preference_N, 0.5)
    assert labels.position_bias == pytest.approx(probability - 0.5)
    assert feedback.agreement(labels, [True] * 10).mean == 0.5


def test_a_tie_is_one_half_up_to_rounding():
    preference_N = np.array([0.5, np.nextafter(0.5, 0), np.nextafter(0.5, 1), 0.5 + 1e-6, np.nan])
    assert feedback.is_tie(preference_N).tolist() == [True, True, True, False, False]
    labels = feedback.label(PAIRS[:5], FakeJudge(prefers_good), principle=PRINCIPLE)._replace(preference_N=preference_N)
    assert feedback.agreement(labels, [True] * 5).mean == pytest.approx((0.5 * 3 + 1) / 4)


@pytest.mark.parametrize("other", [[0.6] * 10, [1] * 10, [np.nan] * 10, [True] * 9, [[True] * 10]])
def test_agreement_refuses_what_is_not_one_bool_for_each_label(other):
    labels = feedback.label(PAIRS, FakeJudge(prefers_good), principle=PRINCIPLE)
    with pytest.raises(ValueError, match=r"must be bool of shape \(10,\)"):
        feedback.agreement(labels, other)


def test_the_interval_of_the_agreement_is_that_of_the_clusters():
    labels = feedback.label(PAIRS, FakeJudge(prefers_good), principle=PRINCIPLE)
    right = [True] * 7 + [False] * 3
    once = feedback.agreement(labels, right, clusters=range(10))
    repeated = labels._replace(preference_N=np.append(np.repeat(labels.preference_N, 4), np.nan))
    again = feedback.agreement(repeated, [*np.repeat(right, 4), True], clusters=[*np.repeat(range(10), 4), 11])
    np.testing.assert_allclose(again, once, rtol=1e-6)
    assert feedback.agreement(repeated, [*np.repeat(right, 4), True]).lo > once.lo + 0.05


def test_probabilities_are_clamped_in_each_order():
    labels = feedback.label(PAIRS[:1], FakeJudge(prefers_good), principle=PRINCIPLE, clamp=(0.4, 0.6))
    np.testing.assert_allclose(labels.preference_N, (0.6 + 1 - 0.4) / 2)


def test_examples_come_before_the_question():
    examples = [feedback.Example(feedback.Pair("q", "yes", "no"), "B")]
    text = feedback.question(PAIRS[0], principle=PRINCIPLE, examples=examples)
    assert text.startswith(feedback.question(examples[0].pair, principle=PRINCIPLE) + "B)")
    assert text.endswith(feedback.question(PAIRS[0], principle=PRINCIPLE)) and text.endswith("(")


def test_stored_answers_are_not_asked_again(tmp_path):
    path, judge = tmp_path / "folder" / "answers.jsonl", FakeJudge(prefers_good)
    first = feedback.label(PAIRS, judge, principle=PRINCIPLE, answers=path)
    again = feedback.label(PAIRS, judge, principle=PRINCIPLE, answers=path)
    assert len(judge.questions) == 20 and (again.asked, again.stored) == (0, 20)
    np.testing.assert_array_equal(first.preference_N, again.preference_N)
    other = FakeJudge(prefers_good, name="another model")
    assert feedback.label(PAIRS, other, principle=PRINCIPLE, answers=path).asked == 20
    assert feedback.label(PAIRS, judge, principle="Which is shorter?", answers=path).asked == 20


def test_equal_questions_are_asked_once():
    judge = FakeJudge(prefers_good)
    labels = feedback.label([PAIRS[0]] * 3, judge, principle=PRINCIPLE)
    assert len(judge.questions) == 2 and len(labels.preference_N) == 3


def test_answers_before_an_interrupt_are_kept(tmp_path):
    path, count = tmp_path / "answers.jsonl", 0

    def interrupted(text):
        nonlocal count
        count += 1
        if count == 8:
            raise KeyboardInterrupt
        return prefers_good(text)

    with pytest.raises(KeyboardInterrupt):
        feedback.label(PAIRS, FakeJudge(interrupted), principle=PRINCIPLE, answers=path)
    with path.open("a") as file:
        file.write('{"key": "abc')  # an interrupted write
    judge = FakeJudge(prefers_good)
    labels = feedback.label(PAIRS, judge, principle=PRINCIPLE, answers=path)
    assert (labels.stored, labels.asked) == (7, 13) and np.isfinite(labels.preference_N).all()
    keys = [json.loads(line)["key"] for line in path.read_text().splitlines()]
    assert len(keys) == len(set(keys)) == 20


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_the_budget_of_questions_is_exact_and_the_rest_is_asked_later(tmp_path, batch):
    path, judge = tmp_path / "answers.jsonl", FakeJudge(prefers_good)
    options = {"principle": PRINCIPLE, "answers": path, "batch": batch}
    labels = feedback.label(PAIRS, judge, max_questions=7, **options)
    assert len(judge.questions) == 7 and (labels.asked, labels.waiting) == (7, 13)
    assert np.isnan(labels.preference_N).sum() == 7  # three pairs are complete
    labels = feedback.label(PAIRS, judge, **options)
    assert len(judge.questions) == 20 and labels.waiting == 0 and np.isfinite(labels.preference_N).all()


def test_the_budget_of_tokens_stops_at_the_next_batch():
    judge = FakeJudge(prefers_good)
    labels = feedback.label(PAIRS, judge, principle=PRINCIPLE, max_tokens=10, batch=1)
    assert (len(judge.questions), labels.tokens) == (4, 12)
    assert feedback.label(PAIRS, judge, principle=PRINCIPLE, max_tokens=0).asked == 0


def test_errors_and_unclear_answers_are_counted():
    def sometimes(text):
        if "question 1\n" in text:
            return TimeoutError("no answer")
        return feedback.Answer(None) if "question 2\n" in text else prefers_good(text)

    labels = feedback.label(PAIRS, FakeJudge(sometimes), principle=PRINCIPLE)
    assert labels.errors == {"TimeoutError: no answer": 2} and labels.unclear == 2 and labels.asked == 20
    np.testing.assert_array_equal(np.isnan(labels.preference_N), [i in (1, 2) for i in range(10)])
    found = feedback.agreement(labels, [i != 3 for i in range(10)])
    assert found.mean == 7 / 8 and (found.lo, found.hi) == pytest.approx(wilson(7, 8))


@pytest.mark.parametrize(
    "options",
    [{"clamp": (0.6, 0.4)}, {"batch": 0}, {"max_questions": -1}, {"examples": [feedback.Example(PAIRS[0], "first")]}],
)
def test_invalid_settings_are_refused(options):
    with pytest.raises(ValueError):
        feedback.label(PAIRS, FakeJudge(prefers_good), principle=PRINCIPLE, **options)


def test_a_model_judges_by_its_log_probabilities():
    cfg = lm.LMConfig.preset("tiny", max_length=512)
    params = lm.init(jax.random.key(0), cfg)
    judge = feedback.ModelJudge(
        params, cfg=cfg, encode=lambda text: list(text.encode()), choices=(65, 66), name="tiny", batch=2
    )
    texts = ["short (", "a longer question (", "(", "x" * 100]
    answers = dict(judge(texts))
    for i, text in enumerate(texts):
        row = jax.numpy.array([list(text.encode())])
        logits = lm.logits(params, lm.forward(params, row, cfg=cfg).hidden_BLD[:, -1], cfg=cfg)[0]
        a, b = np.exp(np.float64(logits[65])), np.exp(np.float64(logits[66]))
        assert answers[i].probability == pytest.approx(a / (a + b), rel=1e-4) and answers[i].tokens == len(text)
    labels = feedback.label(PAIRS, judge, principle=PRINCIPLE)
    assert np.isfinite(labels.preference_N).all() and labels.asked == 20
