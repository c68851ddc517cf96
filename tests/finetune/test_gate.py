"""The gate that refuses unusual prompts: gate.py and sample.py --gate, on a tiny model."""

import dataclasses
import itertools
import json

import gate
import jax.numpy as jnp
import numpy as np
import pytest
import sample
import word_models
from finetune import answers
from judging import gate_measures, prompt_gate
from launch import initial_model, run_folder
from launch.run_settings import Compute, Template

from rlhf_jax import diagnostics, lm
from rlhf_jax.data import chat, dialogues, errors, records
from rlhf_jax.diagnostics import ood

USUAL, UNUSUAL = ("tea", "milk", "bread", "salt", "rice", "fish"), ("saw", "axe", "bomb", "gun")
WORDS = (*USUAL, *UNUSUAL, "yes", "no")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model, its usual and its unusual prompts, and a gate with four examples."""
    folder = tmp_path_factory.mktemp("gate")
    model = word_models.save(folder / "model", words=WORDS, seed=0)
    for name, words in (("usual", USUAL), ("unusual", UNUSUAL)):
        lines = [json.dumps({"prompt": " ".join(each)}) for each in itertools.product(words, repeat=3)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder, str(model)


def fit(files, out, **changes):
    folder, model = files
    given = {"model": model, "prompts": str(folder / "usual.jsonl"), "unusual": str(folder / "unusual.jsonl")}
    return gate.run(gate.GateSettings(**(given | {"out": str(out), "refusals": 0.1} | changes)))


def prompts(rows, questions=None):
    """Prompts with these token ids, of conversations that begin with these questions."""
    texts = [str(i) for i in range(len(rows))] if questions is None else questions
    found = [
        records.Prompt(prompt=(dialogues.Turn("user", text), dialogues.Turn("user", f"{row}")))
        for row, text in zip(rows, texts)
    ]
    return answers.Prompts(list(rows), found, list(range(len(rows))))


def load(folder, model, **template):
    return prompt_gate.load(str(folder), model, template=Template(**template))


def test_a_gate_refuses_unusual_prompts_before_an_answer_is_generated(files, tmp_path, capsys):
    model_path = files[1]
    results = fit(files, tmp_path / "gate", examples=4)
    assert results == json.loads((tmp_path / "gate" / "results.json").read_text())
    assert results["prompts"] == {"fit": 108, "limit": 54, "test": 54, "known": 32, "unknown": 32}
    assert results["refused_usual"][0] < 0.3 < 0.7 < results["refused_unusual"][0]
    assert list(results["areas"])[2:] == ["classifier, 1 example", "classifier, 10 examples"]
    page = (tmp_path / "gate" / "report.html").read_text()
    assert "<svg" in page and "unusual prompts that are refused" in page

    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text('{"prompt": "gun axe gun"}\n{"prompt": "tea milk rice"}\n{"prompt": "bomb bomb saw"}\n')
    settings = sample.SampleSettings(
        model=model_path,
        prompts=str(mixed),
        out=str(tmp_path / "s.jsonl"),
        n=2,
        max_new_tokens=4,
        gate=str(tmp_path / "gate"),
    )
    lines = sample.run(settings)
    model = initial_model.load(model_path)
    found = load(tmp_path / "gate", model)
    assert (found.layer, found.pooling) == (1, "mean")
    ids = [
        chat.encode_prompt(model.fmt, answers.read_prompts(settings, str(mixed), errors.DropCount())[i].prompt)
        for i in range(3)
    ]
    params, cfg = lm.first_layers(model.params, cfg=model.cfg, layers=found.layer)
    hidden = np.stack([np.asarray(lm.forward(params, jnp.array([row]), cfg=cfg).hidden_BLD)[0].mean(0) for row in ids])
    assert isinstance(found.detector, ood.Probe)
    expected = ood.exposure(found.detector, hidden) > found.limit
    assert expected.any() and not expected.all()
    assert [line.get("refused", False) for line in lines] == np.repeat(expected, 2).tolist()
    for line in lines:
        if line.get("refused"):
            assert (line["response"], line["tokens"], line["stopped"]) == ("I cannot help with that.", 0, True)
    assert f"refused by --gate: {expected.sum()} of 3 prompts" in capsys.readouterr().out
    plain = sample.run(
        sample.SampleSettings(
            model=model_path, prompts=str(mixed), out=str(tmp_path / "plain.jsonl"), n=2, max_new_tokens=4
        )
    )
    for line, other in zip(lines, plain):
        assert line.get("refused") or {**line, "logprob": 0} == {**other, "logprob": 0}, "other answers do not change"


def test_a_gate_without_examples_uses_the_relative_distance(files, tmp_path):
    results = fit(files, tmp_path / "gate", unusual=None)
    assert results["detector"] == "relative" and "areas" not in results
    found = load(tmp_path / "gate", initial_model.load(files[1]))
    assert isinstance(found.detector, ood.Gaussian)
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(5, found.detector.mean_D.shape[0]))
    np.testing.assert_allclose(found.score(hidden), ood.relative_mahalanobis(found.detector, hidden))


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_hidden_states_do_not_depend_on_the_batch(files, pooling):
    model = initial_model.load(files[1])
    rows = [[5, 6, 7], [6], [7, 8, 5, 6, 9], [5, 5]]
    options = {"layer": 1, "mesh": None, "pooling": pooling}
    whole, single = (prompt_gate.hidden_states(model, rows, batch=batch, **options) for batch in (3, 1))
    np.testing.assert_allclose(whole, single, rtol=1e-4, atol=1e-5)
    for row, found in zip(rows, whole):
        first, cfg = lm.first_layers(model.params, cfg=model.cfg, layers=1)
        hidden_LD = np.asarray(lm.forward(first, jnp.array([row]), cfg=cfg).hidden_BLD)[0]
        expected = hidden_LD.mean(axis=0) if pooling == "mean" else hidden_LD[-1]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_equal_prompts_are_in_one_part():
    usual, unusual = [[i % 10] for i in range(40)], [[i] for i in range(5, 15)]
    parts = gate_measures.divide(prompts(usual), prompts(unusual), seed=3)
    indices = [*parts.fit, *parts.limit, *parts.test, *parts.known, *parts.unknown]
    assert sorted(indices) == list(range(15)) and len(parts.ids) == 15
    assert {parts.ids[i][0] for i in (*parts.known, *parts.unknown)} == {10, 11, 12, 13, 14}
    sizes = [len(getattr(parts, name)) for name in gate_measures.PARTS]
    assert sizes[0] == 5 and sum(sizes[:3]) == 10 and min(sizes[1:3]) >= 2 and sizes[3:] == [3, 2]
    three = prompts([[i] for i in range(9)], [str(i % 3) for i in range(9)])
    for bad, other, match in (
        (prompts([[1]] * 9), None, "1 different"),
        (prompts(usual), prompts([[1], [2]]), "--unusual has 0 different"),
        (three, None, "--prompts has 3 conversations"),
    ):
        with pytest.raises(errors.DataError, match=match):
            gate_measures.divide(bad, other, seed=0)


@pytest.mark.parametrize("seed", range(3))
def test_conversations_are_not_divided_and_shares_are_clustered_by_them(seed):
    usual = prompts([[i] for i in range(60)], [f"usual {i % 12}" for i in range(60)])
    unusual = prompts([[i] for i in range(60, 100)], [f"unusual {i % 8}" for i in range(40)])
    parts = gate_measures.divide(usual, unusual, seed=seed)
    questions = [each.prompt[0].text for each in (*usual.records, *unusual.records)]
    sets = {name: {questions[i] for i in getattr(parts, name)} for name in gate_measures.PARTS}
    assert [len(each) for each in sets.values()] == [6, 3, 3, 4, 4], "no conversation is in two parts"
    assert len(set().union(*sets.values())) == 20 == len(set(parts.conversation_N.tolist()))
    hidden = np.random.default_rng(seed).normal(size=(100, 3)) + parts.conversation_N[:, None] % 3
    fitted = gate_measures.fit(hidden, parts, examples=0, refusals=0.3)
    own = prompt_gate.Gate(fitted.kind, fitted.detector, 1, "mean", fitted.limit, {})
    measured = gate_measures.measure(own, hidden, parts)
    for name, part in (("refused_usual", parts.test), ("refused_unusual", parts.unknown)):
        labels = parts.conversation_N[part].tolist()
        assert measured[name] == list(diagnostics.clustered_mean(own.refuses(hidden[part]), labels, rate=True))
    assert list(measured["clusters"].values()) == [3, 4]


def test_the_share_of_false_refusals_is_that_of_the_limit():
    rng, refused = np.random.default_rng(0), []
    for seed in range(300):
        parts = gate_measures.divide(prompts([[i] for i in range(160)]), None, seed=seed)
        hidden = rng.normal(size=(160, 3))
        fitted = gate_measures.fit(hidden, parts, examples=0, refusals=0.2)
        own = prompt_gate.Gate(fitted.kind, fitted.detector, 1, "mean", fitted.limit, {})
        refused.append(gate_measures.measure(own, hidden, parts)["refused_usual"][0])
    assert abs(np.mean(refused) - 0.2) < 0.02  # at most 0.2, and at least 0.2 - 1 / 41


def test_a_gate_of_another_model_or_a_damaged_file_is_refused(files, tmp_path):
    fit(files, tmp_path / "gate", limit=30)
    other = word_models.save(tmp_path / "other", words=WORDS, seed=1)
    model = initial_model.load(str(other))
    with pytest.raises(run_folder.SettingError, match="was fitted to another model"):
        load(tmp_path / "gate", model)
    for content, match in ((b"", "is not a gate"), (b"PK\x03\x04", "is not a gate"), (b"{}", "is not a gate")):
        (tmp_path / "damaged").write_bytes(content)
        with pytest.raises(run_folder.SettingError, match=match):
            load(tmp_path / "damaged", model)
    with pytest.raises(run_folder.SettingError, match="cannot read --gate"):
        load(tmp_path / "absent", model)
    with pytest.raises(run_folder.SettingError, match=r"it is a run of gate\.py"):
        initial_model.check(str(tmp_path / "gate"))


def test_a_gate_of_other_hidden_states_of_the_same_model_is_refused(files, tmp_path):
    fit(files, tmp_path / "gate", limit=30, compute=Compute(dtype="bfloat16"))
    model = initial_model.load(files[1])
    half = dataclasses.replace(model, cfg=dataclasses.replace(model.cfg, dtype="bfloat16"))
    assert load(tmp_path / "gate", half).layer == 1
    dated = dataclasses.replace(half, fmt=dataclasses.replace(half.fmt, date="2024-07-26"))
    options = '{"enable_thinking": false}'
    for own, template, match in (
        (model, {}, "--compute.dtype is float32, but was bfloat16"),
        (half, {"options": options}, "--template.options is .* but was None"),
        (dated, {}, "the date of the chat template is 2024-07-26, but was None"),
    ):
        with pytest.raises(run_folder.SettingError, match=match):
            load(tmp_path / "gate", own, **template)


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--examples", "3"], "no effect without --unusual"),
        (["--refusals", "0"], "--refusals is 0"),
        (["--layer", "0"], "--layer is 0"),
    ],
)
def test_flags_out_of_range_are_errors_that_name_them(flags, match):
    with pytest.raises(run_folder.SettingError, match=match):
        gate.parse(["--model", "m", "--prompts", "p", *flags])


def test_flags_that_the_data_refute_are_errors(files, tmp_path):
    for changes, match in (({"layer": 9}, "--layer is 9; it must be at most"), ({"examples": 33}, "at most 32")):
        with pytest.raises(run_folder.SettingError, match=match):
            fit(files, tmp_path / "gate", **changes)
    with pytest.raises(run_folder.SettingError, match="--refusal has no effect without --gate"):
        sample.parse(["--model", "m", "--prompts", "p", "--refusal", "no"])


def test_too_few_prompts_for_a_limit_are_reported(files, tmp_path, capsys):
    fit(files, tmp_path / "gate", limit=30, refusals=0.01)
    assert "the gate refuses nothing: --refusals 0.01 needs at least 99 prompts" in capsys.readouterr().out
