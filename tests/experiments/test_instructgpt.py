"""Runs instructgpt.py from the command line and checks its files, results and errors."""

import contextlib
import dataclasses
import gzip
import io
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

import instructgpt
import jax
import numpy as np
import pytest
import real_run
from recipe import evaluation, run_setup, tasks
from rich.console import Console

from rlhf_jax.data import errors
from rlhf_jax.report import results as results_lib
from rlhf_jax.simulation import prompts, world

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = str(ROOT / "experiments" / "instructgpt.py")
WINS = ("gold_win_rate_vs_sft", "heldout_win_rate_vs_sft")
NUMBERS = ("gold", "reward", "kl", "skill_accuracy", "pretraining_loss", "truthful_rate", "harm_rate", "length")


# A user's environment, without the XLA flags of the tests.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
ENVIRONMENT |= {"JAX_PLATFORMS": "cpu", "COLUMNS": "120"}
# Runs share compiled programs to save time.
COMPILED = tempfile.TemporaryDirectory(prefix="rlhf-jax-compiled-")
ENVIRONMENT |= {"JAX_COMPILATION_CACHE_DIR": COMPILED.name, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
ENVIRONMENT |= {"JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}


def command(*arguments):
    return [sys.executable, SCRIPT, *map(str, arguments)]


def run(*arguments, timeout=600):
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=timeout, env=ENVIRONMENT, cwd=ROOT, check=False
    )


def results_of(folder):
    """Returns the results that must be equal in every run, without times and memory."""
    results = json.loads((folder / "results.json").read_text())
    return {name: value for name, value in results.items() if name not in ("seconds", "peak_rss_mb")}


def run_and_kill(folder, stage, step, *arguments):
    """Starts the job and kills it (SIGKILL) after a stage has logged a step."""
    with open(folder.parent / "killed.log", "w") as log:
        job = subprocess.Popen(
            command("--preset", "smoke", "--out", folder, *arguments),
            stdout=log,
            stderr=log,
            cwd=ROOT,
            env=ENVIRONMENT,
        )
        wanted = f'"stage": "{stage}", "step": {step},'
        deadline = time.time() + 300
        while time.time() < deadline and job.poll() is None:
            metrics = folder / "metrics.jsonl"
            if metrics.exists() and wanted in metrics.read_text():
                job.send_signal(signal.SIGKILL)
                break
            time.sleep(0.02)
        assert job.wait(timeout=60) == -signal.SIGKILL, (folder.parent / "killed.log").read_text()[-2000:]
    assert not (folder / "results.json").exists()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = run("--preset", "smoke", "--out", folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done


def test_results_are_complete_and_consistent(finished):
    folder, _ = finished
    results = json.loads((folder / "results.json").read_text())
    assert results["seed"] == 0 and results["seconds"] > 0 and 100 < results["peak_rss_mb"] < 4096
    assert isinstance(results["dropped"], dict)
    mean, low, high = results["reward_model"]["accuracy"]
    assert 0 <= low <= mean <= high <= 1
    assert set(results["policies"]) == {"base", "sft", "sft_mix", "ppo", "ppo_ptx", "best_of_n"}
    for name, policy in results["policies"].items():
        for wins in WINS:
            mean, low, high = policy[wins]
            assert low <= mean <= high
        for number in NUMBERS:
            if name == "best_of_n" and (number == "kl" or number not in policy):
                continue  # best-of-n has no model that could be probed, and its KL has no interval
            mean, low, high = policy[number]
            assert low <= mean <= high, number
        assert policy["gold_by_category"]
    assert results["policies"]["best_of_n"]["kl_bound"] == pytest.approx(math.log(4) - 3 / 4)
    assert 1 < results["held_out"]["asked"] < results["held_out"]["prompts"] == 128
    assert abs(results["policies"]["sft_mix"]["kl"][0]) < 1e-4, "the KL of the reference to itself is 0"
    assert results["programs"] == {"supervised": 1, "reward_model": 1, "ppo": 1, "sampling": 3}
    assert results["policies"]["sft"]["gold_win_rate_vs_sft"][0] == 0.5
    for wins in ("ppo", "ppo_ptx", "best_of_n"):
        gained = results["goodhart"][wins]
        assert gained["reward_gained"][1] <= gained["reward_gained"][0] and isinstance(gained["gamed"], bool)
        assert results["policies"][wins]["length_controlled_win_rate_vs_sft"] is not None
    model = results["reward_model"]
    assert 0 <= model["pairs_of_equal_answers_dropped"] < model["pairs"]
    assert model["label_agreement_target"] == 0.75 and 0.6 < model["label_agreement"][0] < 0.9
    for policy in results["policies"].values():
        assert 0 <= policy["gold_strict_wins_vs_sft"][0] <= policy["gold_win_rate_vs_sft"][0]
    assert sum(each["count"] for each in model["strata"]["category"]) == model["held_out_pairs"]
    assert model["thresholds"]["count"][0] == model["held_out_pairs"] == model["length_bias"]["count"]
    np.testing.assert_allclose(model["gap"]["validation_accuracy"], model["accuracy"], atol=1e-6)
    assert results["ptx_coef"]["per_token"] == 1.0 and 0 < results["ptx_coef"]["per_sequence"] < 1


def test_the_stored_results_of_a_real_run_have_the_shape_of_this_one(finished):
    folder, _ = finished
    results, stored = json.loads((folder / "results.json").read_text()), real_run.results()
    hint = "; copy results.json and metrics.jsonl of `instructgpt.py --preset smoke --seed 0` to tests/cases/smoke_run"
    assert real_run.shape(results | {"dropped": {}}) == real_run.shape(stored | {"dropped": {}}), hint
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [sorted(row) for row in rows] == [sorted(row) for row in real_run.metrics()], hint


def test_a_run_has_one_duration(finished):
    folder, done = finished
    seconds = results_lib.seconds_text(json.loads((folder / "results.json").read_text())["seconds"])
    assert f"duration {seconds}" in " ".join(done.stdout.split())
    assert f"duration {seconds}" in (folder / "report.html").read_text()
    assert "stages done\n" in done.stderr


def test_every_output_file_is_written(finished):
    folder, done = finished
    for name in ("results.json", "report.html", "config.json", "metrics.jsonl"):
        assert (folder / name).stat().st_size > 0, name
    assert list((folder / "tensorboard").rglob("events.*"))
    for model in ("policy", "reward_model"):
        assert (folder / model / "model.safetensors").exists() and (folder / model / "config.json").exists()
        assert (folder / model / "tokenizer.json").exists()
    assert "PPO-ptx" in done.stdout and "best-of-n" in done.stdout
    assert "stage 1/8" in done.stderr and "left" in done.stderr


def test_exported_models_are_those_that_were_evaluated(finished):
    from rlhf_jax import lm
    from rlhf_jax.data import tokenizers

    folder, _ = finished
    cfg, params = lm.load(folder / "policy")
    tokenizer = tokenizers.load(folder / "policy")
    assert cfg.vocab_size == len(tokenizer) and "head" not in params
    _, reward = lm.load(folder / "reward_model")
    stored = json.loads((folder / "results.json").read_text())["reward_model"]
    assert float(reward["head"]["bias"]) == pytest.approx(stored["bias"], rel=1e-6)


def test_first_update_starts_from_equal_models(finished):
    folder, _ = finished
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for stage in ("ppo", "ppo_ptx"):
        first = next(row for row in rows if row["stage"] == stage)
        assert abs(first["kl"]) < 1e-6 and first["first_ratio_error"] < 1e-5
    assert "validation_loss" in [row for row in rows if row["stage"] == "reward_model"][-1]
    steps = [row["step"] for row in rows if row["stage"] == "pretrain"]
    assert steps == list(range(1, len(steps) + 1))


def test_a_killed_run_resumes_bit_identically(finished, tmp_path):
    folder, _ = finished
    killed = tmp_path / "run"
    run_and_kill(killed, "ppo", 2)
    done = run("--resume", killed)
    assert done.returncode == 0, done.stderr[-3000:]
    assert results_of(killed) == results_of(folder)
    ours, theirs = ((each / "metrics.jsonl").read_text() for each in (killed, folder))
    assert ours == theirs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "step"), [("pretrain", 30), ("sft", 5), ("sft_mix", 20), ("reward_model", 3), ("ppo_ptx", 3)]
)
def test_a_run_killed_in_any_stage_resumes_bit_identically(finished, tmp_path, stage, step):
    folder, _ = finished
    killed = tmp_path / "run"
    run_and_kill(killed, stage, step)
    assert run("--resume", killed).returncode == 0
    assert results_of(killed) == results_of(folder)


def test_a_finished_run_is_not_run_again(finished):
    folder, _ = finished
    before = (folder / "results.json").read_text()
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        instructgpt.main(["--resume", str(folder)])
    assert "PPO-ptx" in output.getvalue() and "is already finished" in output.getvalue()
    assert (folder / "results.json").read_text() == before


def dialogue(question, answer):
    return f"\n\nHuman: {question}\n\nAssistant: {answer}"


def comparisons(n):
    words = ("apple", "bridge", "candle", "desk", "eagle", "forest", "garden", "harbour", "island", "jungle")
    for i in range(n):
        a, b = words[i % 10], words[(i // 10) % 10]
        question = f"What do you think of the {a} and the {b} number {i}?"
        chosen = f"The {a} is lovely, and the {b} is useful."
        yield {"chosen": dialogue(question, chosen), "rejected": dialogue(question, f"No {b} for you.")}


def write(path, records):
    text = "".join(json.dumps(record) + "\n" for record in records)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


def test_human_comparisons_provide_the_data_of_every_stage(tmp_path):
    records = [*comparisons(60), {"chosen": dialogue("Hi?", ""), "rejected": dialogue("Hi?", "Go.")}]
    path = write(tmp_path / "pairs.jsonl", records)
    arguments = ["--preset", "smoke", "--data.path", str(path), "--data.max-dropped", "0.1", "--data.held-out", "0.2"]
    parsed = instructgpt.parse(arguments)
    task = tasks.make_task(parsed)
    assert task.world is None and task.comparisons is not None and task.dropped.dropped == {"empty answer": 1}
    train, held = task.comparisons
    np.testing.assert_array_equal(train.ranks_BK, [[1, 2]] * 48)
    assert (len(train.ranks_BK), len(held.ranks_BK)) == (48, 12)
    assert train.tokens_BKL.shape == (48, 2, task.row_width) and len(task.demonstrations.tokens_BL) == 48
    assert task.pretraining_BL.shape[1] == task.row_width and len(task.pretraining_held_out_BL) > 0
    assert len(task.rl_prompts) == 48 and len(task.eval_prompts) == 12 and not any(task.eval_prompts.categories)


def test_every_stage_of_the_world_asks_only_what_its_split_may_ask():
    task = tasks.make_task(instructgpt.parse(["--preset", "smoke", "--comparisons.prompts", "640"]))
    sets = prompts.split_prompts(world.make_world(0), 0)
    P, asked_of = task.prompt_width, {}
    for rows in prompts.all_prompts(world.make_world(0)).values():
        for prompt, _ in rows:
            for prefix in prompts.PREFIXES:
                turns = dataclasses.replace(prompt, prefix=prefix).turns
                asked_of[tuple(prompts.prompt_tokens(turns))] = prompt.asked

    def asked(tokens_BP, mask_BP):
        return [asked_of[tuple(row[mask].tolist())] for row, mask in zip(tokens_BP, mask_BP)]

    def may_ask(universe):
        return {prompt.asked for rows in universe.values() for prompt, _ in rows}

    demos, rl, held_out = task.demonstrations, task.rl_prompts, task.eval_prompts
    compare, n = task.world.compare_prompts, task.world.n_compare  # type: ignore
    train = [asked(demos.tokens_BL[:, :P], demos.mask_BL[:, :P]), asked(rl.tokens_BP, rl.mask_BP)]
    ranked = asked(compare.tokens_BP, compare.mask_BP)
    assert (n, len(ranked)) == (640, 704)
    assert set().union(*train, ranked[:n]) <= may_ask(sets.train)
    assert set(ranked[n:]) <= may_ask(sets.validation)
    tested = asked(held_out.tokens_BP, held_out.mask_BP)
    assert set(tested) <= may_ask(sets.test)
    # The index says which prompts ask the same.
    indices = {}
    for each, index in zip(tested, held_out.asked_B.tolist()):
        assert indices.setdefault(each, index) == index
    assert len(set(indices.values())) == len(indices)


def task_of(path, *more):
    widths = ("--data.max-dropped", 0.1, "--data.held-out", 0.2, "--data.vocab-size", 300)
    parsed = instructgpt.parse([str(each) for each in ("--preset", "smoke", "--data.path", path, *widths, *more)])
    return tasks.make_task(parsed)


def plain(records):
    """Converts dialogues to records of prompt, chosen and rejected."""
    for record in records:
        (question, chosen), (_, rejected) = (
            record[side].removeprefix("\n\nHuman: ").split("\n\nAssistant: ") for side in ("chosen", "rejected")
        )
        yield {"prompt": question, "chosen": chosen, "rejected": rejected}


def test_every_format_of_comparisons_leads_to_the_same_task(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    pyarrow_parquet = pytest.importorskip("pyarrow.parquet")
    whole = [*comparisons(30), {"chosen": dialogue("Hi?", ""), "rejected": dialogue("Hi?", "Go.")}]
    pairs = list(plain(whole))
    user, assistant = ([{"role": role, "content": ""}] for role in ("user", "assistant"))
    messages = [
        {
            side: [user[0] | {"content": p["prompt"]}, assistant[0] | {"content": p[side]}]
            for side in ("chosen", "rejected")
        }
        for p in pairs
    ]
    ranked = [{"prompt": p["prompt"], "responses": [p["rejected"], p["chosen"]], "ranks": [2, 1]} for p in pairs]
    parquet = tmp_path / "pairs.parquet"
    pyarrow_parquet.write_table(pyarrow.Table.from_pylist(pairs), parquet)
    first, *others = (
        write(tmp_path / "dialogues.jsonl", whole),
        write(tmp_path / "pairs.jsonl.gz", pairs),
        write(tmp_path / "messages.jsonl", messages),
        write(tmp_path / "ranked.jsonl", ranked),
        parquet,
    )
    want = task_of(first)
    assert want.comparisons is not None and len(want.comparisons[0].ranks_BK) == 24
    for path in others:
        got = task_of(path)
        for name in ("comparisons", "demonstrations", "pretraining_BL", "pretraining_held_out_BL"):
            jax.tree.map(np.testing.assert_array_equal, getattr(got, name), getattr(want, name))
        assert got.rl_prompts.texts == want.rl_prompts.texts and got.eval_prompts.texts == want.eval_prompts.texts
        assert got.dropped.dropped == want.dropped.dropped == {"empty answer": 1}, path


def test_rankings_keep_all_answers_and_refused_roles_are_reported(tmp_path):
    answers = [["One.", "Two.", "Three.", "Four."], ["Yes.", "No."]]
    records = [
        {"prompt": f"How many {i}?", "responses": answers[i % 2], "ranks": [[2, 1, 3, 1], [2, 1]][i % 2]}
        for i in range(40)
    ]
    task = task_of(write(tmp_path / "ranked.jsonl", records))
    assert task.comparisons is not None and [len(each.ranks_BK) for each in task.comparisons] == [32, 8]
    wanted = {(1, 1, 2, 3), (1, 2, 0, 0)}
    for part in task.comparisons:
        assert {tuple(ranks) for ranks in np.asarray(part.ranks_BK).tolist()} == wanted
    text = task.tokenizer.decode(task.demonstrations.tokens_BL[0], skip_special_tokens=True)
    assert text.startswith("How many") and text.endswith(("?Two.", "?No.")), "the demonstration is the best answer"
    for record in records:
        record["prompt"] = [{"role": "system", "content": "Be short."}, {"role": "user", "content": record["prompt"]}]
    with pytest.raises(
        errors.DataError, match=r"system\.jsonl: none of 32 comparisons is usable .*refused by the chat template"
    ):
        task_of(write(tmp_path / "system.jsonl", records))


def test_fields_that_are_not_used_are_reported(tmp_path):
    records = [
        {**pair, "prompt": [{"role": "user", "content": pair["prompt"], "name": "Ann"}], "note": "a long note"}
        for pair in plain(comparisons(40))
    ]
    report = task_of(write(tmp_path / "named.jsonl", records)).dropped.report()
    assert report.endswith("fields with text that are not used: 'name' 40, 'note' 40")


def test_the_turns_of_a_single_held_out_conversation_are_one_cluster(tmp_path):
    def record(conversation, turns):
        said = [text for turn in range(turns) for text in (f"Question {turn} about {conversation}?", f"Fact {turn}.")]
        roles = ("user", "assistant")
        prompt = [{"role": roles[i % 2], "content": text} for i, text in enumerate([*said, "And then?"])]
        return {"prompt": prompt, "responses": [f"It is the {conversation}.", "No."], "ranks": [1, 2]}

    records = [record(name, turns) for name in ("apple", "bridge") for turns in (1, 2, 3, 4)]
    path = write(tmp_path / "turns.jsonl", records)
    arguments = ["--preset", "smoke", "--data.path", str(path), "--data.held-out", "0.5", "--data.vocab-size", "280"]
    task = tasks.make_task(instructgpt.parse([*arguments, "--data.prompt-width", "256"]))
    assert len(task.eval_prompts) == 4 and len(set(task.eval_prompts.asked_B.tolist())) == 1
    assert task.comparisons is not None
    train, held_out = map(task.asked, task.comparisons)
    assert len(set(train.tolist())) == len(set(held_out.tolist())) == 1 and train[0] != held_out[0]


def test_accuracies_of_fewer_problems_than_skills_are_reported():
    found = evaluation.skill_accuracy(np.array([True, False]), np.array([[1, 2], [3, 4]]))
    assert list(found["skills"]) == ["copy", "sort"] and found["skills"]["sort"] == [0.0, 0.0, 1.0]
    assert found["skill_accuracy"][0] == 0.5


def test_warnings_about_the_data_are_saved_as_incidents(tmp_path):
    records = [
        {"prompt": "Why?", "responses": [f"Yes, that is number {i}.", "No."], "ranks": [1, 2]} for i in range(40)
    ]
    path, out = write(tmp_path / "alike.jsonl", records), tmp_path / "run"
    asked = instructgpt.parse(
        ["--preset", "smoke", "--data.path", str(path), "--data.held-out", "0.25", "--out", str(out)]
    )
    with run_setup.open_run(asked, Console(quiet=True), weights=()) as (folder, job):
        assert [len(each.ranks_BK) for each in job.task.comparisons] == [30, 10]  # type: ignore
        (incident,) = folder.incidents()
    assert incident["stage"] == "data" and incident["text"].startswith("all 40 comparisons have the same prompt")


@pytest.mark.slow
def test_ppo_logs_the_score_of_a_heldout_reward_model(tmp_path):
    few = ("--pretrain.steps", 20, "--ppo.iterations", 2, "--evaluation.prompts", 24, "--ppo.critic", "zero-head")
    done = run("--preset", "smoke", "--saves", 2, *few, "--reward-model.heldout", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["reward_model"]["training_prompts"] == 48 and results["programs"]["reward_model"] == 1
    assert 0 < results["heldout_reward_model"]["accuracy"][0] < 1
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    both = [(row["heldout_reward"], row["reward"]) for row in rows if row["stage"].startswith("ppo")]
    assert len(both) == 4 and all(a != b for a, b in both), "another model scores the same answers"
    assert {row["stage"] for row in rows} >= {"reward_model", "heldout_reward_model"}


@pytest.mark.slow
def test_the_job_runs_on_human_comparisons(tmp_path):
    records = [*comparisons(300), {"chosen": dialogue("Hi?", ""), "rejected": dialogue("Hi?", "Go.")}]
    path = write(tmp_path / "pairs.jsonl.gz", records)
    little = (
        "--preset",
        "smoke",
        "--saves",
        2,
        "--pretrain.steps",
        20,
        "--ppo.iterations",
        2,
        "--evaluation.prompts",
        24,
    )
    done = run(*little, "--data.path", path, "--out", tmp_path / "run", "--data.held-out", 0.2)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["dropped"]["empty answer"] == 1 and "empty answer 1" in done.stdout
    mean, low, high = results["reward_model"]["accuracy"]
    assert 0 <= low <= mean <= high <= 1 and results["reward_model"]["held_out_pairs"] == 60
    for policy in results["policies"].values():
        assert set(policy) <= real_run.OF_HUMAN_DATA
    assert "gold" not in done.stdout.lower()


def refused(*arguments):
    """Runs the job in this process, expects exit status 2, and returns the single line on stderr."""
    output = io.StringIO()
    with contextlib.redirect_stderr(output), pytest.raises(SystemExit) as exit_info:
        instructgpt.main([str(argument) for argument in arguments])
    assert exit_info.value.code == 2
    lines = [line for line in output.getvalue().splitlines() if line.strip()]
    assert len(lines) == 1, output.getvalue()
    return lines[0]


def test_an_invalid_setting_ends_the_command_with_status_2(tmp_path):
    done = run("--out", tmp_path / "run", "--ppo.clip", 0, timeout=60)
    assert done.returncode == 2 and done.stderr.startswith("error: --ppo.clip is 0.0") and not done.stdout


def test_errors_name_the_file_and_the_line(tmp_path):
    out = tmp_path / "run"
    good = list(comparisons(5))

    def error_of(name, content):
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            write(path, content)
        message = refused("--preset", "smoke", "--out", out, "--data.path", path)
        assert str(path) in message and not out.exists()
        return message

    missing = tmp_path / "none.jsonl"
    assert str(missing) in refused("--out", out, "--data.path", missing)
    short = [{"prompt": f"Name {n}.", "chosen": f"{n}", "rejected": "No."} for n in range(20)]
    assert "the held-out dialogues have" in error_of("short.jsonl", short)
    error_of("broken.jsonl.gz", gzip.compress(b"x" * 1000)[:-20])
    assert "line 2" in error_of("words.jsonl", json.dumps(good[0]).encode() + b"\nnot json\n")
    assert "line 3" in error_of("fields.jsonl", [*good[:2], {"chosen": good[0]["chosen"]}])
    assert "line 1" in error_of("turns.jsonl", [{"chosen": "\n\nHuman: Hi", "rejected": "\n\nHuman: Hi"}])
    assert "--data.held-out" in error_of("few.jsonl", good[:1])
    many = error_of("empty.jsonl", [*good, {"chosen": dialogue("Q", ""), "rejected": dialogue("Q", "A")}])
    assert "empty answer 1" in many


@pytest.mark.parametrize(
    ("flag", "value", "name"),
    [
        ("--ppo.kl-coef", "-1", "ppo.kl-coef"),
        ("--ppo.minibatches", "7", "ppo.minibatches"),
        ("--sft.mix", "1.5", "sft.mix"),
        ("--comparisons.min-k", "1", "comparisons.min-k"),
        ("--preset", "huge", "preset"),
    ],
)
def test_errors_name_the_invalid_setting(tmp_path, flag, value, name):
    assert name in refused("--out", tmp_path / "run", flag, value)
    assert not (tmp_path / "run").exists()


def test_a_folder_in_use_is_refused(finished, tmp_path):
    folder, _ = finished
    assert str(folder) in refused("--preset", "smoke", "--out", folder)
    assert str(tmp_path) in refused("--resume", tmp_path)
    assert "config.json" in refused("--resume", folder, "--seed", "3")


def test_help_lists_flags_of_every_group():
    done = run("--help", timeout=60)
    assert done.returncode == 0
    for flag in ("--ppo.kl-coef", "--data.path", "--seed", "--resume", "--out", "--preset"):
        assert flag in done.stdout
