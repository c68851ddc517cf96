"""Tests experiments/reward_model.py: folds without leakage, baselines, refused settings, resuming, and a full run."""

import contextlib
import dataclasses
import io
import json
import pathlib
import re
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
import reward_model as script
from launch import run_folder
from launch import settings as settings_lib
from preferences import cross_validation_results, fold_pairs, reward_settings, reward_stages
from recipe import human_comparisons

from rlhf_jax import diagnostics, lm, types
from rlhf_jax.data import comparison_transforms, dialogues, errors

WORDS = ("apple", "bridge", "candle", "desk", "eagle", "forest", "garden", "harbour", "island", "jungle")


def dialogue(question, answer):
    return f"\n\nHuman: {question}\n\nAssistant: {answer}"


def write(path, n=40):
    """Writes pairs whose rejected answers are refusals; every third rejected answer is shorter than the chosen one."""
    records = []
    for i in range(n):
        a, b = WORDS[i % 10], WORDS[(i // 10) % 10]
        question = f"What do you think of the {a} and the {b} number {i}?"
        bad = "Sorry, no." if i % 3 == 0 else f"Sorry, I can not speak of any {b} today, nor tomorrow, nor ever."
        records.append(
            {"chosen": dialogue(question, f"The {a} is fine and useful."), "rejected": dialogue(question, bad)}
        )
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def pairs_of(path):
    return human_comparisons.pairs(human_comparisons.read(settings_lib.Data(path=str(path)), errors.DropCount()))


def test_folds_test_every_pair_once():
    tested = human_comparisons.fold_indices(np.arange(23), 5, seed=3)
    assert sorted(np.concatenate(tested)) == list(range(23)) and {len(indices) for indices in tested} == {4, 5}
    other = human_comparisons.fold_indices(np.arange(23), 5, seed=4)
    assert any((a != b).any() for a, b in zip(tested[:3], other[:3]))
    group = np.array([0, 0, 1, 2, 2, 2, 3, 4, 5, 5])
    tested = human_comparisons.fold_indices(group, 2, seed=0)
    assert sorted(np.concatenate(tested)) == list(range(10)) and not set(group[tested[0]]) & set(group[tested[1]])


@hypothesis.given(st.lists(st.integers(1, 40), min_size=2, max_size=30), st.integers(2, 8), st.integers(0, 99))
def test_no_fold_is_empty_and_groups_larger_than_a_fold_are_alone(sizes, folds, seed):
    group = np.repeat(np.arange(len(sizes)), sizes)
    if len(sizes) < folds:
        with pytest.raises(ValueError, match=f"{len(sizes)} groups cannot be divided into {folds} folds"):
            human_comparisons.fold_indices(group, folds, seed=seed)
        return
    tested = human_comparisons.fold_indices(group, folds, seed=seed)
    assert sorted(np.concatenate(tested)) == list(range(len(group))) and min(map(len, tested)) > 0
    members = [set(group[test]) for test in tested]
    assert sum(map(len, members)) == len(sizes), "no group is divided"
    for large in np.flatnonzero(np.array(sizes) * folds > len(group)):
        assert {large} in members
    if max(sizes) * folds <= len(group):
        assert max(map(len, tested)) < len(group) / folds + max(sizes)


def pairs_that_open_alike(share, n=200):
    """Pairs whose system texts differ, and the ``share`` of which ask the same question."""
    turns = [
        (dialogues.Turn("system", f"You are {i}."), dialogues.Turn("user", "Who?" if i < share * n else f"Who is {i}?"))
        for i in range(n)
    ]
    return [human_comparisons.Pair(prompt, "a", "b") for prompt in turns]


def split(pairs, seed=0, held_out=0.1):
    notes = []
    data = settings_lib.Data(path="x.jsonl", held_out=held_out)
    return *human_comparisons.split(data, pairs, jax.random.key(seed), warn=notes.append), notes


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 1.0])
def test_a_tenth_is_held_out_however_many_conversations_open_with_one_question(share):
    with_system = pairs_that_open_alike(share)
    without = [dataclasses.replace(pair, prompt=pair.prompt[1:]) for pair in with_system]
    for seed in range(12):
        for pairs in (with_system, without):
            train, held_out, notes = split(pairs, seed)
            assert (len(train), len(held_out)) == (180, 20)
            if share == 1 and pairs is without:
                assert notes == [
                    "all 200 comparisons have the same prompt, so they are divided as if they were different "
                    "conversations: no prompt is held out"
                ]
            else:
                assert not notes and not {p.prompt for p in train} & {p.prompt for p in held_out}


def test_later_turns_stay_with_their_conversation_unless_all_begin_alike():
    def prompts(first, answers):
        turns = [dialogues.Turn("user", first), dialogues.Turn("assistant", "Yes."), dialogues.Turn("user", "Why?")]
        return [tuple([*turns, dialogues.Turn("assistant", f"{i}"), turns[-1]][: 1 + 2 * (i % 3)]) for i in answers]

    pairs = [human_comparisons.Pair(p, "a", "b") for first in range(30) for p in prompts(f"Is it {first}?", range(6))]
    train, held_out, notes = split(pairs)
    assert len(held_out) == 18 and not notes
    assert not {p.prompt[0] for p in train} & {p.prompt[0] for p in held_out}
    alike = [human_comparisons.Pair(p, "a", "b") for p in prompts("Is it?", range(90))]
    train, held_out, notes = split(alike)
    assert len(held_out) == 9 and not {p.prompt for p in train} & {p.prompt for p in held_out}
    assert notes == [
        "all 90 comparisons have the same first question, so they are divided by their whole prompts, which share "
        "earlier turns"
    ]


def test_a_share_that_whole_conversations_do_not_allow_is_a_warning():
    pairs = [human_comparisons.Pair((dialogues.Turn("user", f"{i // 50}?"),), "a", "b") for i in range(200)]
    train, held_out, (note,) = split(pairs)
    assert (len(train), len(held_out)) == (150, 50)
    assert note == (
        "the share of held-out comparisons is 25.0% (50 of 200), although --data.held-out is 0.1, because "
        "conversations are not divided and the largest has 50 comparisons"
    )
    with pytest.raises(errors.DataError, match=r"x\.jsonl has 4 comparisons, too few for --data\.held-out 0\.1"):
        split(pairs[::50])
    with pytest.raises(errors.DataError, match=r"x\.jsonl has 1 comparison, too few for --data\.held-out 0\.5"):
        split(pairs[:1], held_out=0.5)


def test_tfidf_learns_words_and_favours_neither_order(tmp_path):
    pytest.importorskip("sklearn")
    from preferences import reward_baselines

    pairs = pairs_of(write(tmp_path / "pairs.jsonl", 60))
    model = reward_baselines.TfidfChoice(pairs[:40], seed=0)
    assert (model(pairs[40:]) > 0).all() and model.strength in reward_baselines.STRENGTHS
    swapped = [human_comparisons.Pair(p.prompt, p.rejected, p.chosen) for p in pairs[40:]]
    np.testing.assert_allclose(model(swapped), -model(pairs[40:]), atol=1e-12)
    lengths = reward_baselines.shorter_wins(pairs)
    np.testing.assert_array_equal(lengths > 0, [len(p.chosen) < len(p.rejected) for p in pairs])


def test_the_summary_combines_all_folds():
    pairs = [human_comparisons.Pair((dialogues.Turn("user", f"q{i}"),), "a" * (1 + i % 3), "bb") for i in range(20)]
    truth = np.random.default_rng(0).normal(size=20)
    folds = []
    for test in human_comparisons.fold_indices(np.arange(20), 2, seed=0):
        margins = truth[test].tolist()
        members = [margins, (-truth[test]).tolist()]
        folds.append(
            {"reward_model": margins, "members": members, "tfidf": [1.0] * len(test), "shorter": [0.0] * len(test)}
            | {"train_accuracy": 0.75, "tfidf_train_accuracy": 1.0, "tfidf_strength": 0.1}
        )
    results = cross_validation_results.summary(pairs, folds, seed=0)
    accuracy = float((truth > 0).mean())
    assert results["methods"]["reward_model"]["accuracy"][0] == pytest.approx(accuracy)
    assert results["methods"]["tfidf"]["accuracy"][0] == 1 and results["methods"]["shorter"]["accuracy"][0] == 0.5
    mean, low, high = results["difference"]["tfidf"]
    assert mean == pytest.approx(accuracy - 1) and low <= mean <= high
    assert results["single_member_accuracy"] == pytest.approx(0.5) and results["train_accuracy"] == pytest.approx(0.75)
    log_loss = float(np.logaddexp(0, -truth).mean())
    assert results["methods"]["reward_model"]["log_loss"][0] == pytest.approx(log_loss)
    together = results["together"]["accuracy"][0]
    assert together == pytest.approx(float((truth + 1 > 0).mean()))
    assert results["together"]["over_tfidf"][0] == pytest.approx(together - 1)
    assert [row["group"] for row in results["by_turn"]] == ["turn 1"] and results["by_turn"][0]["pairs"] == 20
    # Pairs whose answers have equal length belong to neither group.
    assert [row["pairs"] for row in results["by_length"][-2:]] == [7, 6]


def test_rankings_yield_all_pairs_and_conversations_stay_together(tmp_path):
    prompt = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Why?"}]
    record = {"prompt": prompt, "responses": ["b", "a", "c", "d"], "ranks": [2, 1, 2, 3]}
    path = tmp_path / "ranked.json"
    path.write_text(json.dumps([record, record | {"prompt": [prompt[0], {"role": "user", "content": "How?"}]}]))
    rankings = human_comparisons.read(settings_lib.Data(path=str(path)), errors.DropCount())
    pairs = human_comparisons.pairs(rankings)
    assert [(p.chosen, p.rejected) for p in pairs[:5]] == [("a", "b"), ("a", "c"), ("a", "d"), ("b", "d"), ("c", "d")]
    assert human_comparisons.conversation_ids(pairs).tolist() == [0] * 5 + [1] * 5, (
        "a shared system turn does not merge conversations"
    )
    other = [human_comparisons.Pair((dialogues.Turn("system", "Be long."), p.prompt[1]), "a", "b") for p in pairs[:1]]
    assert human_comparisons.conversation_ids([*pairs, *other])[-1] == 2, "different system turns divide conversations"
    with pytest.raises(errors.DataError, match=r"ranked\.json, record 1: a turn has the role 'system'"):
        human_comparisons.check_roles(rankings)


def test_truncation_keeps_the_end_of_prompts_and_the_end_of_turn_tokens(tmp_path):
    pairs = pairs_of(write(tmp_path / "pairs.jsonl", 12))
    from rlhf_jax.data import chat, tokenizers

    fmt = chat.chat_format(tokenizers.train_bpe([p.chosen + p.rejected for p in pairs], vocab_size=280))
    settings = reward_settings.CrossValidation(prompt_width=5, response_width=4, vocab_size=280)
    encoded = fold_pairs.encode(fmt, pairs, settings)
    assert {len(ids) for ids in encoded.prompts} == {5}
    assert {len(ids) for side in encoded.answers for ids in side} == {4}
    end = fmt.stop_ids[0]
    assert all(ids[-1] == end for side in encoded.answers for ids in side)
    batch = fold_pairs.pack_pairs(
        encoded, np.arange(6), width=9, pad_id=fmt.pad_id, dropped=0.5, rng=np.random.default_rng(0)
    )
    ends = np.asarray(batch.tokens_RL)[np.asarray(batch.places_BK.row), np.asarray(batch.places_BK.end)]
    assert (ends == end).all(), "word dropout keeps the last token"
    assert (np.asarray(batch.segments_RL) > 0).sum() < 6 * 2 * 9 * 0.75


@pytest.mark.parametrize("pmp", [(), ("--pmp.prompts", "50")], ids=["one-phase", "three-phase"])
def test_cross_validation_runs_end_to_end_and_resumes(pmp, tmp_path):
    pytest.importorskip("sklearn")
    path, out = write(tmp_path / "pairs.jsonl"), tmp_path / "run"
    printed = io.StringIO()
    arguments = ["--preset", "smoke", "--data.path", str(path), "--folds", "2", "--out", str(out), *pmp]
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        script.main(arguments)
    results = json.loads((out / "results.json").read_text())
    assert results["pairs"] == 40 and len(results["folds"]) == 2 and "TF-IDF" in printed.getvalue()
    mean, low, high = results["methods"]["reward_model"]["accuracy"]
    assert 0 <= low <= mean <= high <= 1
    assert "<svg" in (out / "report.html").read_text() and "fold-2" in printed.getvalue()
    if pmp:
        one, three = (results["methods"][m]["accuracy"][0] for m in ("reward_model", "three_phase"))
        gains = {row["group"]: row["gain"] for row in results["pmp"]["gain"]}
        assert list(gains) == ["all", "turn 1"] and gains["all"][0] == pytest.approx(three - one)
        assert gains["all"][1] <= gains["all"][0] <= gains["all"][2]
        assert 0 <= results["pmp"]["own_accuracy"] <= 1 and "three_phase" in results["by_turn"][0]
        assert "accuracy after PMP" in printed.getvalue() and "reward model after PMP" in printed.getvalue()
    else:
        assert "pmp" not in results and "PMP" not in printed.getvalue()
    # Without results.json, the run resumes from its checkpoints and computes the same results.
    (out / "results.json").unlink()
    (out / "fold-2.json").unlink()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        script.main(["--resume", str(out)])
    again = json.loads((out / "results.json").read_text())
    varying = ("seconds", "peak_rss_mb")
    assert {k: v for k, v in again.items() if k not in varying} == {
        k: v for k, v in results.items() if k not in varying
    }


def dialogue_pairs():
    """Pairs of four conversations; the first has two turns, and its first turn is the prompt of another pair."""
    first = (dialogues.Turn("user", "Who?"),)
    later = (*first, dialogues.Turn("assistant", "Me."), dialogues.Turn("user", "Why?"))
    pairs = [human_comparisons.Pair(first, "Me.", "You."), human_comparisons.Pair(later, "So.", "No.")]
    return pairs + [human_comparisons.Pair((dialogues.Turn("user", f"{i}?"),), f"a{i}", f"b{i}") for i in range(3)]


def test_comparisons_without_labels_have_a_turn_of_another_conversation_and_ignore_the_labels():
    pairs = dialogue_pairs()
    turns = fold_pairs.assistant_turns(pairs)
    assert len(turns) == 4 + 6, "a turn that is in two dialogues counts once"
    assert len({conversation for *_, conversation in turns}) == 4
    own = {(prompt, text): conversation for prompt, text, conversation in turns}
    of_text = {text: conversation for _, text, conversation in turns}
    made = fold_pairs.compare_turns(pairs, 25, np.random.default_rng(0))
    assert len(made) == 25
    for pair in made:
        assert own[pair.prompt, pair.chosen] != of_text[pair.rejected]
    assert len({(pair.prompt, pair.chosen) for pair in made[:10]}) == 10, "each turn is used before one is repeated"
    swapped = [human_comparisons.Pair(pair.prompt, pair.rejected, pair.chosen) for pair in pairs]
    assert {turn[:2] for turn in fold_pairs.assistant_turns(swapped)} == set(own)
    with pytest.raises(ValueError, match="at least two conversations"):
        fold_pairs.compare_turns(pairs[:1], 5, np.random.default_rng(0))


def test_marked_pairs_are_those_of_the_control_tokens():
    """The list form and `comparison_transforms.add_control_tokens` give the same sequences in the same order."""
    prompts, answers = [[4], [5, 6, 7]], ([[10, 2], [11, 12, 2]], [[13, 14, 2], [15, 2]])
    marked = fold_pairs.mark(fold_pairs.Encoded(prompts, answers), good_id=20, bad_id=21, prompt_width=3)
    P, T = 3, 3
    tokens = np.zeros((2, 2, P + T), np.int32)
    for b, ids in enumerate(prompts):
        tokens[b, :, P - len(ids) : P] = ids
        for k in range(2):
            tokens[b, k, P : P + len(answers[k][b])] = answers[k][b]
    batch = types.Comparisons(tokens, tokens > 0, np.array([[1, 2]] * 2), np.ones((2, 2), bool))  # type: ignore[arg-type]
    rows = comparison_transforms.add_control_tokens(batch, good_id=20, bad_id=21, column=P)
    for i in range(4):
        for k in range(2):
            expected = np.asarray(rows.tokens_BKL)[i, k][np.asarray(rows.mask_BKL)[i, k]].tolist()
            found = marked.prompts[i] + marked.answers[k][i]
            assert found == expected[max(0, len(prompts[i // 2]) - P + 1) :], "a full prompt loses its first token"


def test_the_gain_of_pretraining_is_paired_by_pair_and_clustered_by_conversation():
    pairs = [human_comparisons.Pair((dialogues.Turn("user", f"q{i // 2}"),), "a", "bb") for i in range(20)]
    rng = np.random.default_rng(0)
    group_N = human_comparisons.conversation_ids(pairs)
    one, three = rng.normal(size=(2, 20)) + np.array([[0.0], [1.0]])
    folds = []
    for test in human_comparisons.fold_indices(group_N, 2, seed=0):
        margins = {"reward_model": one[test].tolist(), "three_phase": three[test].tolist()}
        margins |= {"tfidf": [1.0] * len(test), "shorter": [0.0] * len(test), "members": [one[test].tolist()]}
        facts = {"train_accuracy": 0.75, "tfidf_train_accuracy": 1.0, "tfidf_strength": 0.1}
        folds.append(margins | facts | {"pmp": {"accuracy": 0.5, "own_accuracy": 0.75}})
    pmp = cross_validation_results.summary(pairs, folds, seed=0)["pmp"]
    gain_N = (three > 0) * 1.0 - (one > 0)
    assert [row["group"] for row in pmp["gain"]] == ["all", "turn 1"] and pmp["own_accuracy"] == 0.75
    assert pmp["gain"][0]["gain"] == pytest.approx(list(diagnostics.clustered_mean(gain_N, group_N.tolist())))
    assert pmp["gain"][0]["clusters"] == 10


def test_embeddings_are_extended_and_truncated_again():
    variants: list[dict[str, Any]] = [dict(tie_embeddings=True), dict(tie_embeddings=False, positions="learned")]
    for variant in variants:
        cfg = lm.LMConfig(vocab_size=10, n_layers=1, d_model=8, n_heads=2, d_mlp=8, max_length=6, **variant)
        wide = lm.LMConfig(vocab_size=12, n_layers=1, d_model=8, n_heads=2, d_mlp=8, max_length=7, **variant)
        params = lm.init(jax.random.key(0), cfg)
        extended = reward_stages.extend_embeddings(params, jax.random.key(1), wide)
        assert jax.tree.map(lambda x: x.shape, extended) == jax.tree.map(lambda x: x.shape, lm.abstract(wide))
        back = reward_stages.truncate_embeddings(extended, cfg)
        jax.tree.map(np.testing.assert_array_equal, back, params)


def refused(*arguments):
    """Returns the single line on stderr of a command that exits with status 2."""
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr), pytest.raises(SystemExit) as exit:
        script.main([str(argument) for argument in arguments])
    assert exit.value.code == 2
    (line,) = [line for line in stderr.getvalue().splitlines() if line.strip()]
    return line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--folds", "1"), "--folds is 1"),
        (("--folds", "5"), "--folds is 5; it needs --data.path"),
        (("--ppo.clip", "0.1"), "--ppo.clip has no effect on reward_model.py"),
        (("--training.label-smoothing", "0.6"), "--training.label-smoothing is 0.6"),
        (
            ("--training.loss", "best", "--training.margin", "1"),
            "--training.margin has no effect with --training.loss best",
        ),
        (("--training.heads", "0"), "--training.heads is 0"),
        (("--training.limit", "0"), "--training.limit is 0"),
        (("--training.trains", "^nothing"), "--training.trains: '^nothing' matches none of the parameters"),
        (("--training.trains", "("), "--training.trains: '(' is not a regular expression"),
        (("--data.path", "x", "--folds", "2", "--cv.heads", "3"), "--cv.heads is 3"),
        (("--pmp.prompts", "9", "--pmp.agreement", "0.4"), "--pmp.agreement is 0.4"),
        (("--data.path", "x", "--pmp.prompts", "9"), "--pmp.prompts is 9; it must be left out with --data.path, but"),
        (
            ("--data.path", "x", "--folds", "2", "--pmp.prompts", "9", "--pmp.tuning-rate", "0.1"),
            "--pmp.tuning-rate has no effect with --folds",
        ),
        (("--data.path", "x", "--folds", "2", "--pmp.rate", "1"), "--pmp.rate has no effect without --pmp.prompts"),
    ],
)
def test_invalid_settings_are_refused_by_flag(tmp_path, arguments, message):
    assert message in refused("--out", tmp_path / "run", *arguments)
    assert not (tmp_path / "run").exists()


def test_too_many_folds_and_broken_files_are_refused(tmp_path):
    pytest.importorskip("sklearn")
    path = write(tmp_path / "pairs.jsonl", 30)
    too_many = refused("--out", tmp_path / "run", "--data.path", path, "--folds", "5")
    assert "at most 3, a tenth of the 30 pairs" in too_many
    records = [{"prompt": f"Why {i // 20}?", "responses": ["a", "b"], "ranks": [1, 2]} for i in range(40)]
    few = tmp_path / "few.jsonl"
    few.write_text("".join(json.dumps(record) + "\n" for record in records))
    too_many = refused("--out", tmp_path / "run", "--data.path", few, "--folds", "3")
    assert "--folds is 3; it must be at most 2, the number of conversations in" in too_many
    assert not (tmp_path / "run").exists()
    missing = tmp_path / "none.jsonl"
    assert str(missing) in refused("--out", tmp_path / "run", "--data.path", missing, "--folds", "2")


def test_every_setting_survives_the_configuration_file(tmp_path):
    settings = script.parse(["--preset", "smoke", "--training.heads", "3", "--pmp.prompts", "7"])
    run = tmp_path / "run"
    run_folder.create(run, settings)
    again = script.parse(["--resume", str(run)])
    assert (again.training, again.pmp, again.cv, again.folds) == (settings.training, settings.pmp, settings.cv, 0)


def test_flags_override_the_smoke_preset_even_with_default_values():
    folds = ["--data.path", "x", "--folds", "2"]
    settings = script.parse(["--preset", "smoke", *folds, "--cv.width", "64", "--cv.epochs", "2"])
    assert (settings.cv.width, settings.cv.epochs, settings.cv.mlp) == (64, 2, 16)
    assert script.parse(["--training.trains", "^head/kernel_HD", "--training.heads", "2"]).cv.width == 64


def test_every_setting_has_an_effect_and_a_help_text():
    folder = pathlib.Path(reward_settings.__file__).parent
    source = "\n".join(p.read_text() for p in folder.glob("*.py") if p.stem != "reward_settings")
    own = (folder / "reward_settings.py").read_text()
    for group in (reward_settings.Training, reward_settings.Pretraining, reward_settings.CrossValidation):
        for field in dataclasses.fields(group):
            assert re.search(rf"\.{field.name}\b", source), f"nothing reads {group.__name__}.{field.name}"
            assert re.search(rf'^    {field.name}: [^\n]*\n    """.+', own, re.MULTILINE), field.name


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["demonstrations", "policy"])
def test_a_single_model_is_trained_normalised_and_saved(tmp_path, rule):
    out = tmp_path / "run"
    arguments = ["--preset", "smoke", "--out", out, "--pretrain.steps", 10, "--training.heads", 2, "--pmp.prompts", 30]
    script.main([str(a) for a in (*arguments, "--training.normalise", rule)])
    results = json.loads((out / "results.json").read_text())["reward_model"]
    assert results["gap"][0] == pytest.approx(results["train_accuracy"][0] - results["accuracy"][0])
    record = lm.load_normalisation(out / "reward_model")
    assert record is not None and record.rule == results["normalisation"]["rule"]
    cfg, params = lm.load(out / "reward_model")
    assert lm.heads.count_heads(params) is None and cfg.vocab_size == params["embed"]["tokens"].shape[0]
    assert (record.gain == 1.0) == (rule == "demonstrations")
    assert (out / "report.html").stat().st_size > 1000
