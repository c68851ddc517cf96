"""Comparisons of a store as arrays, screening, and the report on a pool with biased labelers."""

import math
import re

import labeler_pool
import numpy as np
import pytest
from labeler_pool import item

from rlhf_jax import diagnostics
from rlhf_jax.feedback import store
from rlhf_jax.feedback.commands import report_labelers
from rlhf_jax.feedback.judgements import Completion, Item, Judgement, Prompt
from rlhf_jax.feedback.labelers import labeler_biases, labeler_report, labeler_votes, screening
from rlhf_jax.report import labeler_page


@pytest.fixture
def opened(tmp_path):
    with store.Store(tmp_path / "a.sqlite") as opened:
        for name in ("Ada", "Bo"):
            opened.add_labeler(name)
        yield opened


def say(opened, who, id, **answer):
    opened.record(who, id, Judgement(**answer), key=f"{len(opened.history())}")


# -------------------------------------------------------------------------------------------------------- comparisons


def test_pairs_and_rankings_become_votes(opened):
    pair, ranking, _ = opened.add(
        [item(0, ["a", "bb"], ["x", "y"]), item(1, ["a", "bb", "c"], ["x", "y", "x"]), item(2, ["a"])], set_name="a"
    )
    say(opened, "Bo", pair, preference=0.25)
    say(opened, "Ada", pair, strength=1)
    say(opened, "Ada", ranking, ranks=(2, 1, 2))
    say(opened, "Bo", ranking, unsure=True)
    found = labeler_votes.comparisons(opened, "a")
    assert found.labelers == ["Ada", "Bo"] and found.items == [pair, ranking, ranking, ranking]
    np.testing.assert_array_equal(found.votes_NM, [[1, 0.25], [0, math.nan], [0.5, math.nan], [1, math.nan]])
    np.testing.assert_array_equal(found.votes_NM[:1], opened.preferences("a").votes_NM)
    np.testing.assert_array_equal(found.length_N2, [[1, 2], [1, 2], [1, 1], [2, 1]])
    np.testing.assert_array_equal(found.longer_N, [0, 0, math.nan, 1])
    assert found.domains == ["helpful", *["harmless"] * 3] and found.categories == ["kind 0", *["kind 1"] * 3]
    assert np.isnan(found.first_shown_NM).all()  # nothing was assigned

    wins = labeler_votes.policy_wins(found)
    assert wins.policies == ["x", "y"]
    np.testing.assert_array_equal(wins.wins_CMM, [[[0, 1.25], [0.75, 0]], [[0, 0], [2, 0]]])


def test_the_order_on_the_screen_follows_from_the_assignment(opened):
    opened.add([item(i, ["a", "b", "c"]) for i in range(8)], set_name="a")
    orders = {}
    for n in range(8):
        given = opened.assign("Ada", set_name="a", now=float(n))
        say(opened, "Ada", given.id, ranks=(1, 2, 3))
        orders["Ada", given.id] = given.order
    assert opened.orders("a") == opened.orders() == orders and opened.orders("b") == {}
    found = labeler_votes.comparisons(opened, "a")
    for n, (id, (i, j)) in enumerate(zip(found.items, [(0, 1), (0, 2), (1, 2)] * 8)):
        order = orders["Ada", id]
        assert found.first_shown_NM[n, 0] == (order.index(i) < order.index(j))
    assert 0 < found.first_shown_NM.mean() < 1


def test_strengths_of_a_store_agree_with_choix(opened):
    choix = pytest.importorskip("choix")
    rng, names, expected = np.random.default_rng(0), ["x", "y", "z"], []
    ids, order = [], []
    for _ in range(60):
        first, second = rng.permutation(3)[:2]
        ids += opened.add([item(len(ids), ["a", "b"], [names[first], names[second]])], set_name="a")
        order.append((first, second))
    with opened.transaction(write=True):
        for who in ("Ada", "Bo"):
            for id, (first, second) in zip(ids, order):
                better = rng.random() < 0.6
                expected.append((first, second) if better else (second, first))
                say(opened, who, id, strength=1 if better else 8)
    wins = labeler_votes.policy_wins(labeler_votes.comparisons(opened))
    assert wins.policies == names and wins.wins_CMM.shape == (60, 3, 3)
    found = diagnostics.bradley_terry(wins.wins_CMM, clusters=True)
    strengths = choix.ilsr_pairwise(3, expected, alpha=0.0, tol=1e-12)
    np.testing.assert_allclose(found.value_M, strengths - np.mean(strengths), atol=1e-6)
    scores = [each.mean for each in found.elo(reference=1)]
    np.testing.assert_allclose(scores, 400 / np.log(10) * (strengths - strengths[1]), atol=1e-3)


# ---------------------------------------------------------------------------------------------------------- screening


def test_gold_questions_and_hidden_duplicates_are_compared_by_contents(opened):
    gold_pair, gold_ranking, gold_rating, first, ranking = opened.add(
        [
            item(0, ["a", "b"], expected=Judgement(strength=2)),
            item(1, ["a", "b", "c"], expected=Judgement(ranks=(1, 2, 3))),
            item(2, ["a"], expected=Judgement(rating=1, flags={"sexual_content": True, "violent_content": False})),
            item(3, ["a", "b"]),
            item(4, ["a", "b", "c"]),
        ],
        set_name="a",
    )
    swapped, rotated, other = opened.add(
        [
            item(3, ["b", "a"], duplicate_of=first),
            item(4, ["c", "a", "b"], duplicate_of=ranking),
            item(3, ["b", "z"], duplicate_of=first),
        ],
        set_name="a",
    )
    say(opened, "Ada", gold_pair, strength=4)  # right
    say(opened, "Ada", gold_ranking, ranks=(1, 3, 2))  # two of three
    say(opened, "Ada", gold_rating, rating=7, flags={"sexual_content": True, "hallucination": True})  # one of one
    say(opened, "Bo", gold_pair, unsure=True)
    say(opened, "Ada", first, strength=1)
    say(opened, "Ada", swapped, strength=8)  # the same
    say(opened, "Ada", other, strength=8)  # not a duplicate
    say(opened, "Ada", ranking, ranks=(1, 2, 3))
    say(opened, "Ada", rotated, ranks=(2, 1, 2))  # a, then b and c tied: two of three
    say(opened, "Bo", swapped, strength=8)  # has not judged the original
    items, latest = opened.items("a"), opened.latest("a")
    gold, same = screening.gold_agreement(items, latest), screening.consistency(items, latest)
    assert (gold["Ada"].share.mean, gold["Ada"].count) == (4 / 5, 5) and gold["Bo"].count == 0
    assert (same["Ada"].share.mean, same["Ada"].count) == (3 / 4, 4) and "Bo" not in same


def test_demonstrations_are_rated_by_others(opened):
    prompt = Prompt([{"role": "user", "content": "Write."}])
    ids = opened.add([Item(prompt=prompt, completions=[Completion(text, policy="Ada")]) for text in "ab"], set_name="a")
    for id, rating in zip(ids, (4, 7)):
        say(opened, "Bo", id, rating=rating)
        say(opened, "Ada", id, rating=7)
    found = screening.demonstration_scores(opened.items(), opened.latest())
    assert found.keys() == {"Ada"} and (found["Ada"].share.mean, found["Ada"].count) == (5.5, 2)
    screened = screening.screen(opened.items(), opened.latest(), {}, least=2)
    assert {name: each.verdict for name, each in screened.items()} == {"Ada": "below", "Bo": "too few"}
    assert not screened["Ada"].clearly_below
    assert screening.screen(opened.items(), opened.latest(), {}, least=2, min_score=5.5)["Ada"].verdict == "passes"
    assert screening.screen(opened.items(), opened.latest(), {}, least=3)["Ada"].verdict == "too few"


# -------------------------------------------------------------------------------------------------------------- report


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    path = tmp_path_factory.mktemp("pool") / "pool.sqlite"
    labeler_pool.fill(path).close()
    return path


def test_planted_biases_are_found_and_honest_labelers_are_not_accused(pool):
    with store.Store(pool, read_only=True) as opened:
        found = labeler_report.report(opened, "a", researchers=("Ada", "Bo"), held_out=("Di", "Em"))
    flags = {row.name: row.flags for row in found.labelers}
    assert "position" in flags["first"] and "length" in flags["long"] and "agreement" in flags["random"]
    assert all("screening" in flags[name] for name in ("first", "long", "random"))
    assert [flags[name] for name in labeler_pool.HONEST] == [()] * 5
    rows = {row.name: row for row in found.labelers}
    assert rows["random"].screening.verdict == "below" and rows["random"].below_others.lo > 0
    assert rows["first"].position.first_shown.share.lo > 0.6 and rows["long"].length.longer.share.lo > 0.6
    assert rows["Ada"].judgements == 185 and rows["Ada"].screening.gold.count == 20
    assert rows["Ada"].screening.consistency.count == 15 and rows["Ada"].times.count == 185
    assert (found.pairs, found.prompts) == (190, 150) and found.agreement.count == 190 * 8 * 7 / 2
    assert found.modal.three.share.mean > found.modal.one.share.mean
    assert found.researchers is not None and found.researchers.inside.share.lo > found.researchers.outside.share.hi
    assert found.held_out is not None and found.held_out.outside.count == 190
    assert found.by_domain.keys() == {"helpful", "harmless"} and len(found.by_category) == 3
    assert found.elo["base"].mean == 0 < found.elo["sft"].lo and found.elo["sft"].mean < found.elo["ppo"].mean


def test_a_ranking_is_one_trial_and_flags_allow_for_the_number_of_labelers(pool):
    with store.Store(pool, read_only=True) as opened:
        found = labeler_votes.comparisons(opened, "a")
        biases = labeler_biases.position_bias(found.votes_NM, found.first_shown_NM, items=found.items)
        rows = labeler_report.report(opened, "a").labelers
        assert [row.position.p_value for row in rows] == [each.p_value for each in biases]
        least = min((row for row in rows if row.name != "first"), key=lambda row: row.position.p_value)
        confidence = 1 - 2 * least.position.p_value
        again = labeler_report.report(opened, "a", confidence=confidence).labelers
    assert [row.flags for row in again if row.name == least.name and "position" in row.flags] == []


def test_the_command_prints_and_writes_the_report(pool, tmp_path, capsys):
    html = tmp_path / "labelers.html"
    report_labelers.run(report_labelers.Report(store=str(pool), researchers=("Ada", "Bo"), html=str(html)))
    text, page = capsys.readouterr().out, html.read_text()
    for title in ("Agreement", "Labelers", "Screening", "Disagreement by category", "Policies"):
        assert title in text and f"<h2>{title}</h2>" in page
    assert "Check first (" in text and "random (" in text and "Fleiss' kappa" in text
    assert page.count("<svg") == 7 and "http" not in page.replace("http://www.w3.org", "")


def test_intervals_of_few_prompts_are_marked_as_rough(opened):
    ids = opened.add([item(i, ["a", "b"], ["x", "y"]) for i in range(25)], set_name="a")
    for n, id in enumerate(ids[:19]):
        say(opened, "Ada", id, preference=float(n % 2))
        say(opened, "Bo", id, preference=float(n % 3 > 0))
    few = labeler_report.report(opened)
    assert "rough: they rest on only 19 independent prompts (below 20)." in labeler_page.headline(few)
    [agreement, *_] = labeler_page.tables(few)
    assert agreement.rows[0][1][0][1].endswith("*") and labeler_page.ROUGH_NOTE in agreement.note
    for id in ids[19:]:
        say(opened, "Ada", id, preference=0.0)
        say(opened, "Bo", id, preference=1.0)
    enough = labeler_report.report(opened)
    assert "rough" not in labeler_page.headline(enough) and "*" not in str(labeler_page.tables(enough)[0])
    [policies] = [each for each in labeler_page.sections(enough) if each.title == "Policies"]
    [figure] = policies.figures
    labels = re.findall(r">([^<>]*\d) \(([^<>]*)\)<", figure.svg)
    assert len(labels) == 1 and "." not in str(labels)  # the reference has no interval


def test_a_report_on_few_judgements_has_no_numbers(opened, tmp_path, capsys):
    with pytest.raises(store.StoreError, match="has no judgement"):
        labeler_report.report(opened)
    [rated, _] = opened.add([item(0, ["a"], ["x"]), item(1, ["a", "b"], ["x", "y"])], set_name="a")
    say(opened, "Ada", rated, rating=3)
    found = labeler_report.report(opened, "a")
    assert [row.name for row in found.labelers] == ["Ada"] and found.labelers[0].flags == ()
    assert found.agreement.count == 0 and found.elo == {} and found.elo_error is None
    [pair] = opened.add([item(2, ["a", "b"], ["x", "y"])], set_name="a")
    say(opened, "Ada", pair, strength=1)
    assert "1: y" in (labeler_report.report(opened).elo_error or "")
    report_labelers.run(report_labelers.Report(store=opened.path, html=str(tmp_path / "a.html")))
    assert "have no Elo scores" in capsys.readouterr().out


def test_unknown_names_are_refused(pool, tmp_path):
    with pytest.raises(store.StoreError, match="no judgement of 'Zoe'; it has those of Ada, Bo"):
        report_labelers.run(report_labelers.Report(store=str(pool), researchers=("Zoe",)))
    with pytest.raises(store.StoreError, match="no set 'b'; it has a"):
        report_labelers.run(report_labelers.Report(store=str(pool), set="b"))
    with pytest.raises(store.StoreError, match=r"none\.sqlite cannot be opened"):
        report_labelers.run(report_labelers.Report(store=str(tmp_path / "none.sqlite")))
