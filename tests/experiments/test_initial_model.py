"""Tests instructgpt.py with --model: tokenizer, chat format, gold utility of decoded answers, and errors."""
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

import dataclasses
import datetime
import json
import shutil
import subprocess
import time
import types
from typing import Any

import chat_cases
import compare
import instructgpt
import jax
import numpy as np
import pytest
import sweep
import test_instructgpt as job
from launch import config_file, initial_model, run_folder, settings
from recipe import jobs, run_setup, tasks, world_words

from rlhf_jax import lm
from rlhf_jax.data import chat, dialogues, tokenizers
from rlhf_jax.simulation import lexicon, prompts

SMALL = settings.preset("smoke", pretrained=True)
GPT2: dict[str, Any] = dict(
    norm="layernorm", activation="gelu_tanh", gated_mlp=False, positions="learned", tie_embeddings=True
) | dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias"), True)
LITTLE = (
    *("--preset", "smoke", "--saves", 2, "--pretrain.batch", 16, "--sft.epochs", 1, "--sft.mix-epochs", 1),
    *("--ppo.iterations", 2, "--ppo.batch", 16, "--evaluation.prompts", 24, "--evaluation.best-of", 2),
    *("--evaluation.best-of-prompts", 4, "--evaluation.pretraining-rows", 16),
)
WORLD = (
    *("--pretrain.documents", 800, "--sft.demonstrations", 64, "--comparisons.prompts", 16),
    *("--evaluation.skills", 20),
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def save_gpt2(path, tokenizer, *, more=0, size=None, max_length=160, **fields):
    cfg = lm.LMConfig(
        vocab_size=size or len(tokenizer) + more,
        n_layers=1,
        d_model=32,
        n_heads=2,
        max_length=max_length,
        **(GPT2 | fields),
    )
    lm.save(path, cfg, lm.init(jax.random.key(0), cfg=cfg), tokenizer=tokenizer)
    return path


@pytest.fixture(scope="module")
def byte_pairs():
    """Returns a tokenizer with tokens for most words of the built-in world."""
    text = " ".join(lexicon.WORDS)
    return chat_cases.make_qwen(template=CHATML, words=[text, "user\n" + text, "assistant\n" + text], size=1000)


@pytest.fixture(scope="module")
def checkpoint(byte_pairs, tmp_path_factory):
    return save_gpt2(tmp_path_factory.mktemp("model") / "gpt2", byte_pairs)


@pytest.fixture(scope="module")
def finished(checkpoint, tmp_path_factory):
    """Returns a run that was killed at the start and resumed."""
    folder = tmp_path_factory.mktemp("from_model") / "run"
    command = job.command(*LITTLE, *WORLD, "--model", checkpoint, "--out", folder)
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=job.ROOT, env=job.ENVIRONMENT
    )
    while not (folder / "config.json").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    process.kill()
    process.communicate()
    done = job.run("--resume", folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done


def test_every_id_that_the_files_list_ends_an_answer(byte_pairs, tmp_path):
    """Sampling from Qwen2.5-Instruct, for example, stops at ``<|im_end|>`` and at ``<|endoftext|>``."""
    path = save_gpt2(tmp_path / "m", byte_pairs, more=10)
    ids = byte_pairs.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    assert initial_model.load(str(path)).fmt.stop_ids == (*dict.fromkeys((ids[1], byte_pairs.eos_token_id)),)
    listed = {"eos_token_id": [ids[0], ids[2], len(byte_pairs) + 3]}
    (path / "generation_config.json").write_text(json.dumps(listed))
    model = initial_model.load(str(path))
    assert model.fmt.stop_ids[0] == ids[1] and set(model.fmt.stop_ids) == set(ids)
    assert tasks.document_end(model.fmt) == byte_pairs.eos_token_id


@pytest.mark.slow  # a whole run; the fast version builds only the task and the models
def test_the_job_starts_from_a_model_and_its_tokenizer(finished, checkpoint):
    folder, done = finished
    assert "pretrain: already done" in done.stderr
    assert f"starting from {checkpoint} (gpt2)" in done.stdout and "with generation marks" in done.stdout
    assert "computing in float32" in done.stdout
    assert json.loads((folder / "config.json").read_text())["model"] == str(checkpoint)
    results = json.loads((folder / "results.json").read_text())
    for policy in results["policies"].values():
        assert 0 <= policy["gold"][0] <= 1 and 0 < policy["unknown_words"][0] <= 1
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {row["stage"] for row in rows} == {"sft", "sft_mix", "reward_model", "ppo", "ppo_ptx"}
    assert not any("gold" in row for row in rows), "ids are not the world's words, so PPO cannot log gold"


@pytest.mark.slow  # a whole run; the fast version builds only the task and the models
def test_the_saved_policy_has_the_same_architecture_and_tokenizer(finished, checkpoint):
    folder, _ = finished
    began, ended = initial_model.load(str(checkpoint)), initial_model.load(str(folder / "policy"))
    assert ended.cfg == began.cfg and ended.cfg.model_type == "gpt2"
    assert ended.fmt.origin == "the tokenizer's own" and ended.fmt.template == began.fmt.template
    assert ended.fmt.tokenizer.get_vocab() == began.fmt.tokenizer.get_vocab()
    with pytest.raises(settings.SettingError, match="it is a reward model, not a language model"):
        initial_model.load(str(folder / "reward_model"))


@pytest.mark.slow
def test_the_job_starts_from_the_policy_of_another_run(finished, tmp_path):
    folder, _ = finished
    path = job.write(tmp_path / "pairs.jsonl", job.comparisons(80))
    widths = ("--data.prompt-width", 96, "--data.response-width", 48, "--data.held-out", 0.2)
    out = tmp_path / "run"
    done = job.run(*LITTLE, "--model", folder / "policy", "--data.path", path, *widths, "--out", out)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((out / "results.json").read_text())
    assert results["reward_model"]["held_out_prompts"] == 16
    assert all("gold" not in policy and "reward" in policy for policy in results["policies"].values())
    assert initial_model.load(str(out / "policy")).cfg.model_type == "gpt2"


@pytest.mark.parametrize(("flag", "dtype"), [(None, "float32"), ("float32", "float32"), ("bfloat16", "bfloat16")])
def test_a_float16_model_computes_in_float32_or_as_the_flag_says(byte_pairs, tmp_path, flag, dtype):
    path = save_gpt2(tmp_path / "m", byte_pairs)
    config = json.loads((path / "config.json").read_text())
    del config["rlhf_jax"]
    (path / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    model = initial_model.load(str(path))
    asked = dataclasses.replace(SMALL, compute=settings.TrainCompute(flag))
    task: Any = types.SimpleNamespace(tokenizer=range(300), row_width=70)
    assert jobs.model_config(asked, task, model) == dataclasses.replace(model.cfg, dtype=dtype)
    new = jobs.model_config(asked, task, None)
    assert (new.dtype, new.vocab_size) == (dtype, 300)
    assert run_setup.describe_dtype(new).startswith(f"computing in {dtype}, with parameters in float32")
    restored = config_file.from_dict(settings.Settings, json.loads(json.dumps(dataclasses.asdict(asked))))
    assert restored.compute == asked.compute


@pytest.mark.parametrize("tied", [True, False])
def test_ids_without_a_token_are_removed_from_the_model(byte_pairs, tmp_path, tied):
    fields = (
        {} if tied else {**dict.fromkeys(GPT2, False), "norm": "rmsnorm", "activation": "silu", "positions": "rope"}
    )
    folder = save_gpt2(tmp_path / "m", byte_pairs, more=11, **(fields | {"gated_mlp": not tied}))
    (padded_cfg, padded), began = lm.load(folder), initial_model.load(str(folder))
    n = len(byte_pairs)
    assert (padded_cfg.vocab_size, began.cfg.vocab_size) == (n + 11, n)
    tokens_BL = jax.numpy.arange(10)[None]

    def logits(cfg, params):
        return lm.logits(params, lm.forward(params, tokens_BL, cfg=cfg).hidden_BLD, cfg=cfg)

    np.testing.assert_array_equal(logits(began.cfg, began.params), logits(padded_cfg, padded)[..., :n])


# -------------------------------------------------------------------------------------------------------------- tasks


def test_a_model_with_the_worlds_tokenizer_has_the_default_task(tmp_path):
    few = {"pretrain": {"documents": 600}, "sft": {"demonstrations": 40}, "evaluation": {"prompts": 10}}
    asked = with_changes(SMALL, few)
    folder = save_gpt2(tmp_path / "m", tokenizers.word_level(lexicon.WORDS), max_length=64)
    ours, theirs = tasks.make_task(asked, initial_model.load(str(folder))), tasks.make_task(asked)
    assert ours.in_world_words and theirs.in_world_words
    for name in ("pretraining_BL", "pretraining_held_out_BL", "demonstrations"):
        for x, y in zip(jax.tree.leaves(getattr(ours, name)), jax.tree.leaves(getattr(theirs, name)), strict=True):
            np.testing.assert_array_equal(x, y)
    assert ours.world and theirs.world
    np.testing.assert_array_equal(ours.eval_prompts.words_BP, theirs.eval_prompts.tokens_BP)
    np.testing.assert_array_equal(ours.world.skill_rows.loss_mask_BL, theirs.world.skill_rows.loss_mask_BL)
    assert (ours.prompt_width, ours.response_width) == (prompts.PROMPT_WIDTH, prompts.RESPONSE_WIDTH)


def test_widths_are_measured_in_the_models_tokens(checkpoint):
    began = initial_model.load(str(checkpoint))
    asked = with_changes(SMALL, {"pretrain": {"documents": 3000}})
    task = tasks.make_task(asked, began)
    assert not task.in_world_words and task.world is not None
    every = (task.rl_prompts, task.eval_prompts, task.world.compare_prompts)
    widest = max(each.mask_BP.sum(axis=1).max() for each in every)
    assert prompts.PROMPT_WIDTH < widest <= task.prompt_width <= 160
    assert all(each.words_BP.shape[1] == prompts.PROMPT_WIDTH for each in every if each.words_BP is not None)
    stop = task.fmt.stop_ids[0]
    has_stop = [
        stop in row[learnt] for row, learnt in zip(task.demonstrations.tokens_BL, task.demonstrations.loss_mask_BL)
    ]
    assert np.mean(has_stop) > 0.9 and task.dropped.truncated["answer truncated"] == len(has_stop) - sum(has_stop)
    assert (task.demonstrations.loss_mask_BL[:, : task.prompt_width] == 0).all()
    # The loss of a skill row is computed only on its answer.
    rows = task.world.skill_rows
    texts = [task.tokenizer.decode(ids[learnt]) for ids, learnt in zip(rows.tokens_BL, rows.loss_mask_BL)]
    assert all(text.startswith(" ") and text.strip() for text in texts)


def test_comparisons_of_a_file_are_encoded_in_the_models_tokens(checkpoint, tmp_path):
    began = initial_model.load(str(checkpoint))
    path = job.write(tmp_path / "pairs.jsonl", job.comparisons(40))
    data = {"path": str(path), "prompt_width": 96, "response_width": 48, "held_out": 0.2}
    task = tasks.make_task(with_changes(SMALL, {"data": data}), began)
    assert task.world is None and task.comparisons is not None and task.fmt is began.fmt
    train, held_out = task.comparisons
    assert (len(train.ranks_BK), len(held_out.ranks_BK)) == (32, 8)
    row = task.demonstrations.tokens_BL[0][task.demonstrations.mask_BL[0]]
    text: Any = began.fmt.tokenizer.decode(row)
    assert text.startswith("<|im_start|>user\nWhat do you think of the ")
    assert " useful.<|im_end|>" in text and text.count("<|im_start|>assistant\n") == 1
    # Rows have the widths of the settings, and answers start at the same column.
    assert task.demonstrations.tokens_BL.shape == (32, 144)
    assert (task.demonstrations.loss_mask_BL[:, 96] == 1).all() and not task.demonstrations.loss_mask_BL[:, :96].any()


def with_changes(made, changes):
    parts = {part: dataclasses.replace(getattr(made, part), **change) for part, change in changes.items()}
    return dataclasses.replace(made, **parts)


# ------------------------------------------------------------------------------------------------------ decoded words


def test_answers_are_decoded_to_the_worlds_words(byte_pairs):
    fmt = chat.chat_format(byte_pairs)
    answers = ["the fox is red .", "Red? the fox", "", "the <|end|> fox", "the " * 50]
    ids = chat.encode_answers(fmt, [(dialogues.Turn("user", "what"),)] * len(answers), answers)
    ids[1] = ids[1][:-1]  # truncated, without the end token
    width = max(map(len, ids))
    tokens_BT = np.array([[*x, *[fmt.pad_id] * (width - len(x))] for x in ids])
    mask_BT = np.arange(width) < np.array([[len(x)] for x in ids])
    read = world_words.read(fmt, tokens_BT, mask_BT)
    found = [row[mask].tolist() for row, mask in zip(read.words_BT, read.mask_BT)]
    of = lexicon.IDS
    assert found[0] == [of["the"], of["fox"], of["is"], of["red"], of["."], lexicon.END_ID]
    assert found[1] == [lexicon.PAD_ID, of["?"], of["the"], of["fox"]]
    assert found[2] == [lexicon.END_ID]
    assert found[3] == [of["the"], lexicon.PAD_ID, of["fox"], lexicon.END_ID]
    assert found[4] == [of["the"]] * world_words.WIDTH
    np.testing.assert_allclose(read.unknown_B, [0, 1 / 4, 0, 1 / 3, 0])


# ------------------------------------------------------------------------------------------------------------- errors


def test_unusable_model_folders_raise_a_one_sentence_error(checkpoint, byte_pairs, tmp_path):
    out = tmp_path / "run"
    message = job.refused("--model", tmp_path / "none", "--out", out)
    assert f"--model {tmp_path / 'none'}" in message and not out.exists()
    with pytest.raises(settings.SettingError, match=r"--net\.layers has no effect with --model"):
        instructgpt.parse(["--model", str(checkpoint), "--net.layers", "2"])

    def copy_of(name):
        return shutil.copytree(checkpoint, tmp_path / name)

    cases = {}
    for name, file in (("config", "config.json"), ("tokenizer", "tokenizer.json"), ("weights", "model.safetensors")):
        (copy_of(name) / file).unlink()
        cases[name] = ("cannot use", file if name != "weights" else "safetensors")
    (copy_of("cut") / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes()[:1000])
    (copy_of("damaged") / "tokenizer.json").write_text("{}")
    (copy_of("broken") / "config.json").write_text("{")
    cases |= {"cut": ("cannot", ""), "damaged": ("cannot", ""), "broken": ("cannot use", "")}
    for name, (why, what) in cases.items():
        with pytest.raises(settings.SettingError) as caught:
            initial_model.load(str(tmp_path / name))
        text = str(caught.value)
        assert f"--model {tmp_path / name}: " in text and why in text and what in text and "\n" not in text, name

    short = save_gpt2(tmp_path / "short", byte_pairs, max_length=32)
    with pytest.raises(
        settings.SettingError, match=r"prompts and answers: .* exceed the maximum length of --model .* \(32 tokens\)"
    ):
        tasks.make_task(with_changes(SMALL, {"pretrain": {"documents": 600}}), initial_model.load(str(short)))
    path = job.write(tmp_path / "pairs.jsonl", job.comparisons(20))
    with pytest.raises(settings.SettingError, match=r"--data.prompt-width and --data.response-width: 48 \+ 24 tokens"):
        tasks.make_task(with_changes(SMALL, {"data": {"path": str(path)}}), initial_model.load(str(short)))

    with pytest.raises(ValueError, match=r"more than cfg.vocab_size = .*lm.resize\(params, cfg"):
        save_gpt2(tmp_path / "small", byte_pairs, more=-3)
    small = save_gpt2(tmp_path / "small", None, size=len(byte_pairs) - 3)
    byte_pairs.save_pretrained(small)
    n = len(byte_pairs)
    with pytest.raises(settings.SettingError, match=f"its tokenizer has {n} ids, more than the {n - 3} of the model"):
        initial_model.load(str(small))
    unmarked = save_gpt2(tmp_path / "unmarked", chat_cases.make_gpt2(template="{{ messages[0]['content'] }}"))
    with pytest.raises(settings.SettingError, match="the chat template writes the text of an answer 0 times"):
        initial_model.load(str(unmarked))


def test_options_and_the_date_of_the_chat_template_are_saved_with_the_run(tmp_path, byte_pairs):
    dated = "{{ strftime_now('%d %b %Y') + (mood | default(' calm')) }}" + CHATML
    tokenizer = chat_cases.make_qwen(template=dated, words=[" ".join(lexicon.WORDS), "user\n0123"], size=700)
    folder = save_gpt2(tmp_path / "dated", tokenizer)
    arguments = ["--preset", "smoke", "--model", str(folder), "--template.options", '{"mood": " glad"}']

    def opening(made):
        model = initial_model.load(made.model, template=made.template)
        ids = chat.encode_prompt(model.fmt, [dialogues.Turn("user", "what")])
        return initial_model.with_date(made, model), model.fmt.tokenizer.decode(ids).partition("<|im_start|>")[0]

    made, text = opening(instructgpt.parse([*arguments, "--template.date", "2024-07-26"]))
    assert text == "26 Jul 2024 glad" and made.template.date == "2024-07-26"
    made, text = opening(instructgpt.parse(arguments))
    assert datetime.date.fromisoformat(made.template.date).strftime("%d %b %Y glad") == text, "today"
    run_folder.create(tmp_path / "run", made)
    assert opening(instructgpt.parse(["--resume", str(tmp_path / "run")]))[0].template == made.template
    undated = save_gpt2(tmp_path / "undated", byte_pairs)
    for flags, message in (
        (["--template.options", "x"], "is 'x'; it must be a JSON object"),
        (["--template.options", '{"mod": 1}'], "the chat template has no variable 'mod'; it has none"),
        (["--template.date", "May"], "is 'May'; it must be a date, such as 2025-01-31"),
        (["--template.date", "2024-07-26"], "the chat template of --model writes no date"),
    ):
        with pytest.raises(settings.SettingError, match=message):
            opening(instructgpt.parse(["--model", str(undated), *flags]))
    with pytest.raises(settings.SettingError, match="date has no effect without --model"):
        instructgpt.parse(["--template.date", "2024-07-26"])


@pytest.mark.parametrize("script", [instructgpt, sweep, compare], ids=lambda script: script.__name__)
def test_a_run_does_not_resume_with_a_changed_model(checkpoint, tmp_path, script):
    model, run = shutil.copytree(checkpoint, tmp_path / "model"), tmp_path / "run"
    made = script.parse(["--preset", "smoke", "--model", str(model)])
    before = initial_model.fingerprint(str(model))
    run_folder.create(run, made)
    assert dataclasses.replace(script.parse(["--resume", str(run)]), resume=None) == made
    run_folder.check_inputs_unchanged(str(run), made)
    (model / "README.md").write_text("not read")
    assert initial_model.fingerprint(str(model)) == before
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"layer_norm_epsilon": 1e-6}))
    with pytest.raises(settings.SettingError, match=rf"--resume {run}: the files in {model} have changed"):
        script.run(script.parse(["--resume", str(run)]))


@pytest.mark.parametrize("script", [sweep, compare], ids=lambda script: script.__name__)
def test_every_command_saves_the_fingerprint_of_its_model(checkpoint, tmp_path, monkeypatch, script):
    class StartedError(Exception):
        pass

    def stop(*_, **__):
        raise StartedError

    monkeypatch.setattr(run_setup.jobs, "make_job", stop)
    out, few = tmp_path / "run", ("--pretrain.documents", "800", "--sft.demonstrations", "64")
    with pytest.raises(StartedError):
        script.run(script.parse(["--preset", "smoke", *few, "--model", str(checkpoint), "--out", str(out)]))
    assert config_file.read(str(out))[run_folder.INPUTS]["model"] == initial_model.fingerprint(str(checkpoint))
