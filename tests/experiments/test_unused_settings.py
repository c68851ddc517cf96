"""Every setting of every command changes what is compiled, computed or written, or is refused by name.

Commands run with stand-ins (`dry_run`) at tiny sizes. A new setting is covered as soon as it exists: it must be read
after the checks, and another value, which `ALTERNATIVES` gives if the default rule does not, must change the run.
"""

import dataclasses
import json
import typing
from typing import Any
from unittest import mock

import compare
import constitutional
import dpo
import dpo_vs_ppo
import dry_run
import hh
import instructgpt
import pytest
import reward_model
import sweep
import test_initial_model
import test_instructgpt
from launch import device_mesh, host_agreement, mesh_settings, published_settings, run_folder, setting_checks, settings
from launch.settings import SettingError
from online import hh_settings
from preferences import direct_settings, reward_settings

from rlhf_jax import parallel
from rlhf_jax.data import errors
from rlhf_jax.distributed import hosts
from rlhf_jax.simulation import lexicon

COMMANDS: dict[str, Any] = {
    each.__name__: each for each in (instructgpt, dpo, reward_model, compare, sweep, dpo_vs_ppo, hh, constitutional)
}
TINY: dict[str, dict[str, Any]] = {
    "net": {"layers": 1, "width": 8, "heads": 2, "mlp": 8},
    "pretrain": {"documents": 40, "steps": 2, "batch": 4, "warmup": 1},
    "sft": {"demonstrations": 12, "epochs": 1, "mix_epochs": 1, "mix": 0.25},
    "comparisons": {"prompts": 12, "min_k": 2, "max_k": 4},
    "reward_model": {"batch": 4},
    "ppo": {"iterations": 4, "batch": 8, "minibatches": 2, "warmup": 1, "ema": 0.5},
    "evaluation": {"prompts": 8, "best_of": 4, "best_of_prompts": 4, "skills": 8, "pretraining_rows": 4}
    | {"transcripts": 2},
    "data": {"vocab_size": 300, "prompt_width": 48, "response_width": 24, "max_dropped": 0.1},
}
ALTERNATIVES: dict[str, Any] = {
    "saves": 2,
    "out": "elsewhere",
    "compute.dtype": "bfloat16",
    "sft.mix": 0.5,
    "pretrain.documents": 30,
    "net.heads": 1,
    "net.width": 16,
    "data.vocab_size": 280,
    "data.prompt_width": 56,
    "data.response_width": 20,
    "data.held_out": 0.3,
    "data.max_dropped": 0.0,
    "world.labelers": 5,
    "world.agreement": 0.8,
    "world.polite_taste": 9.0,
    "comparisons.min_k": 3,
    "reward_model.batch": 2,
    "ppo.batch": 16,
    "ppo.minibatches": 4,
    "ppo.micro_batches": 2,
    "ppo.shards": 2,
    "ppo.samples": 4,
    "ppo.top_k": 5,
    "ppo.top_p": 0.8,
    "ppo.max_grad_norm": 0.5,
    "ppo.kl_target": 3.0,
    "ppo.kl_loss_coef": 0.3,
    "ppo.reward_clip": 2.0,
    "ppo.reference_ema": 0.9,
    "ppo.ptx_ratio": 2.0,
    "ppo.discount": 0.9,
    "evaluation.prompts": 3,
    "evaluation.pretraining_rows": 2,
    "evaluation.temperature": 0.5,
    "evaluation.split": "validation",
    "evaluation.best_of_prompts": 2,
    "beta": 0.3,
    "label_smoothing": 0.2,
    "odds_weight": 0.5,
    "margin": 0.25,
    "sft_coef": 0.3,
    "pairs": 2,
    "learning_rate": 1e-3,
    "batch": 2,
    "micro_batches": 2,
    "training.limit": 5,
    "training.trains": "^head/",
    "pmp.prompts": 10,
    "pmp.polite_taste": 9.0,
    "pmp.tuning_rate": 0.02,
    "group": 2,
    "pmp.agreement": 0.75,
    "cv.vocab_size": 290,
    "cv.heads": 1,
    "cv.width": 32,
    "folds": 2,
    "methods": ("ppo", "best-of-n"),
    "at": (0.7,),
    "kl_coefs": (0.05, 0.5),
    "over": ("ppo.clip=0.1,0.4",),
    "betas": (0.2, 0.3, 0.4),
    "parts": ("exact",),
    "bandit_coefs": (0.3,),
    "bandit_pairs": 50,
    "online.sets": ("base", "rejection"),
    "online.pairs": 24,
    "online.held_out": 12,
    "online.snapshots": 1,
    "online.store": "labels.sqlite",
    "judge_model": "NAME",
    "key_variable": "KEY",
    "clamp": (0.4, 0.6),
    "principles": 8,
    "max_requests": 5,
    "pm.batch": 2,
    "pm.harmless_weight": 3.0,
    "pm.score_weights": (1.0, 2.0),
    "revision.principles": 8,
    "revision.miss": 0.9,
    "revision.fail": 0.9,
    "judge.clamp": (0.4, 0.6),
    "judge.position_bias": 4.0,
    "hosts.coordinator": "host:1",
    "hosts.count": 2,
    "hosts.index": 1,
}
"""Other values of settings for which half, twice, the next number or the next choice is not possible."""
ELSEWHERE = {"model", "preset", "published", "resume", "data.path", "out", "template.options", "template.date"}
ELSEWHERE |= {"data.demonstrations", "data.prompts", "data.pretraining", "stop_after"}  # test_recipe_files.py
ELSEWHERE |= {"from_run", "reuse_programs"}
"""Settings that are covered by the tests at the end of this file, as are --mesh and, in instructgpt.py, --hosts; those
of --template are covered in test_initial_model.py, --from-run in test_sweep.py, and --reuse-programs in
test_run_folder.py."""
WITHOUT_EFFECT = {
    ("dpo", "ppo.minibatches"): "must divide --ppo.batch, with which it may have to be changed",
    ("compare", "ppo.minibatches"): "likewise",
    ("hh", "judge"): "needs a model or a server; see test_labels.py",
    ("dpo_vs_ppo", "at"): "needs KLs on both sides, which stand-ins do not reach; see test_direct_alignment.py",
}
GROUP = {"ppo.samples": 2}
WORLD_STUDY = {"seeds": 1, "parts": ("world",), "betas": (0.1,), "kl_coefs": (0.1,), "rounds": 1}

FILE, MODEL = "file", "model"
Variant = tuple[str, str, tuple[str, ...], dict[str, Any]]
"""Command, name of the variant, which of FILE and MODEL it uses, and its other settings."""
VARIANTS: list[Variant] = [
    ("instructgpt", "ppo", (), {}),
    ("dpo", "dpo", (), {}),
    ("dpo", "rounds", (), {"rounds": 2}),
    ("reward_model", "world", (), {}),
    ("reward_model", "pmp", (), {"pmp.prompts": 30}),
    ("compare", "all", (), {"seeds": 1}),
    ("sweep", "ppo", (), {"seeds": 1}),
    ("dpo_vs_ppo", "world", (), WORLD_STUDY),
    ("hh", "rounds", (), {}),
    ("constitutional", "world", (), {"evaluation.prompts": 64}),
]
MORE: list[Variant] = [
    ("instructgpt", "policy critic", (), {"ppo.critic": "policy"}),
    ("instructgpt", "zero head", (), {"ppo.critic": "zero-head"}),
    ("instructgpt", "kl target", (), {"ppo.kl_target": 3.0}),
    ("instructgpt", "no kl", (), {"ppo.kl_coef": 0.0}),
    ("instructgpt", "both kl", (), {"ppo.both_kl_terms": True, "ppo.kl_loss_coef": 0.1}),
    ("instructgpt", "truncated", (), {"ppo.correct_sampler": True, "ppo.top_k": 9, "ppo.top_p": 0.9}),
    ("instructgpt", "held-out", (), {"reward_model.heldout": True, "reward_model.batch": 2}),
    *(("instructgpt", name, (), GROUP | {"ppo.method": name}) for name in ("rloo", "grpo", "dr-grpo")),
    *(("instructgpt", name, (), {"ppo.method": name}) for name in ("reinforce", "reinforce-pp")),
    *(
        ("dpo", f"{loss} {r}", (), {"loss": loss, "rounds": r})
        for loss in typing.get_args(direct_settings.Loss)[1:]
        for r in (0, 2)
    ),
    ("dpo", "labelers", (), {"rounds": 2, "judge": "labelers"}),
    ("dpo", "file rounds", (FILE,), {"rounds": 2}),
    *(("reward_model", loss, (), {"training.loss": loss}) for loss in ("pairs", "plackett-luce", "best")),
    ("reward_model", "normalised on policy", (), {"training.normalise": "policy"}),
    ("reward_model", "pmp rankings", (), {"pmp.prompts": 30, "pmp.binary": False, "pmp.tuning_rate": None}),
    ("reward_model", "folds", (FILE,), {"folds": 2}),
    ("reward_model", "folds pmp", (FILE,), {"folds": 2, "pmp.prompts": 30}),
    *(("compare", name, (), {"seeds": 1, "methods": (name,)}) for name in compare.METHODS),
    ("sweep", "grpo", (), GROUP | {"ppo.method": "grpo", "seeds": 1}),
    ("dpo_vs_ppo", "exact", (), {"parts": ("exact",)}),
    ("hh", "separate", (), {"pm.separate": True}),
    ("hh", "judge", (), {"online.labels": "judge"}),
    *((name, FILE, (FILE,), {}) for name in ("instructgpt", "dpo", "reward_model", "sweep")),
    *((name, MODEL, (MODEL,), {}) for name in COMMANDS if name not in ("dpo_vs_ppo", "hh", "constitutional")),
    ("dpo_vs_ppo", MODEL, (MODEL,), WORLD_STUDY),
    ("instructgpt", "file and model", (FILE, MODEL), {}),
]


def name_of(value: Any) -> str:
    return f"{value[0]}-{value[1]}".replace(" ", "-")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Returns a folder, and the values of --data.path and --model."""
    folder = tmp_path_factory.mktemp("tiny")
    unusable = {"chosen": test_instructgpt.dialogue("Hi?", ""), "rejected": test_instructgpt.dialogue("Hi?", "Go.")}
    answers = {"responses": ["The apple.", "A desk.", "No.", "The garden is lovely."], "ranks": [1, 2, 3, 4]}
    rankings = [{"prompt": f"Which of them do you like, number {i}?"} | answers for i in range(9)]
    path = test_instructgpt.write(folder / "data.jsonl", [*test_instructgpt.comparisons(80), *rankings, unusable])
    text = " ".join(lexicon.WORDS)
    words = [text, "user\n" + text, "assistant\n" + text]
    tokenizer = test_initial_model.chat_cases.make_qwen(template=test_initial_model.CHATML, words=words, size=700)
    model = test_initial_model.save_gpt2(folder / "gpt2", tokenizer)
    rounds = {"online": {"pairs": 16, "rejection": 2, "held_out": 8}, "pm": {"batch": 4}}
    with (
        mock.patch.dict(settings.SMOKE, TINY),
        mock.patch.dict(hh_settings.SMOKE, rounds),
        mock.patch.dict(reward_settings.SMOKE_CV, {"vocab_size": 280}),
    ):
        yield folder, {FILE: ("data.path", str(path)), MODEL: ("model", str(model))}


def command_line(variant: Variant, inputs: Any) -> tuple[list[str], dict[str, Any]]:
    """Returns the arguments and the other settings of a variant."""
    given = [inputs[1][each] for each in variant[2]]
    arguments = [text for name, value in given for text in (setting_checks.flag_name(name), value)]
    return ["--preset", "smoke", *arguments], dict(given) | variant[3]


def value_of(group: Any, name: str) -> Any:
    for part in name.split("."):
        group = getattr(group, part)
    return group


def alternative(made: Any, name: str) -> Any:
    """Returns another value of a setting."""
    value, kind = value_of(made, name), type(made)
    if name in ALTERNATIVES and ALTERNATIVES[name] != value:
        return ALTERNATIVES[name]
    for part in name.split("."):
        kind = typing.get_type_hints(kind)[part]
    for choices in (kind, *typing.get_args(kind)):
        if typing.get_origin(choices) is typing.Literal:
            return next(choice for choice in typing.get_args(choices) if choice != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value / 2 if value else 0.25
    raise NotImplementedError(f"give another value of {name} in ALTERNATIVES")


def is_refused(command: Any, arguments: list[str], changes: dict[str, Any], name: str) -> bool:
    """Returns whether a command refuses a setting, which the message must name; any other message is an error."""
    try:
        dry_run.parse(command, arguments, changes)
    except SettingError as error:
        flags = (setting_checks.flag_name(name), setting_checks.flag_name(name.partition(".")[0]) + ".")
        text = str(error).replace("--no-", "--").replace(".no-", ".")
        reasons = ("no effect", "leave", "left out", "used together", "penalised twice", "requires", "needs")
        assert any(flag in text for flag in flags) and any(r in text for r in reasons), f"{name}: {error}"
        return True
    return False


def covered_elsewhere(command: str, name: str) -> bool:
    return name in ELSEWHERE or name.startswith("mesh.") or (command == "instructgpt" and name.startswith("hosts."))


@pytest.mark.parametrize(
    "variant", [*VARIANTS, *(pytest.param(each, marks=pytest.mark.slow) for each in MORE)], ids=name_of
)
def test_every_setting_is_read_or_refused(variant, inputs):
    command = COMMANDS[variant[0]]
    arguments, base = command_line(variant, inputs)
    made = dry_run.parse(command, arguments, base)
    observed = dry_run.observe(command, arguments, base, inputs[0])
    unread = [
        name
        for name in setting_checks.field_names(made)
        if name not in observed.reads | set(base)
        and not covered_elsewhere(variant[0], name)
        and (variant[0], name) not in WITHOUT_EFFECT
        and not is_refused(command, arguments, base | {name: alternative(made, name)}, name)
    ]
    assert not unread


OWN = {field.name for each in COMMANDS.values() for field in dataclasses.fields(each.parse([]))} - {
    field.name for field in dataclasses.fields(settings.Settings)
}


def has_effect(command: Any, arguments: Any, changes: Any, name: str, before: dry_run.Observed, folder: Any) -> bool:
    """Returns whether a changed setting changes the run; --data.max-dropped must make it end at an unusable record."""
    if name == "data.max_dropped":
        with pytest.raises(errors.DataError, match="1 of 90 records was dropped"):
            dry_run.observe(command, arguments, changes, folder)
        return True
    return bool(before.differences(dry_run.observe(command, arguments, changes, folder)))


def check_changes(variant: Variant, inputs: Any, *, only: Any = lambda name: True) -> None:
    command = COMMANDS[variant[0]]
    arguments, base = command_line(variant, inputs)
    made = dry_run.parse(command, arguments, base)
    before = dry_run.observe(command, arguments, base, inputs[0])
    without_effect = []
    for name in setting_checks.field_names(made):
        elsewhere = covered_elsewhere(variant[0], name) or (variant[0], name) in WITHOUT_EFFECT
        if elsewhere or name in base or not only(name):
            continue
        changes = base | {name: alternative(made, name)}
        if not is_refused(command, arguments, changes, name):
            without_effect += [] if has_effect(command, arguments, changes, name, before, inputs[0]) else [name]
    assert not without_effect


@pytest.mark.parametrize("variant", [VARIANTS[0]], ids=name_of)
def test_changing_an_rl_setting_changes_the_run(variant, inputs):
    check_changes(variant, inputs, only=lambda name: name.startswith(("ppo.", "compute.")))


@pytest.mark.parametrize("variant", [each for each in VARIANTS[1:] if each[1] != "pmp"], ids=name_of)
def test_changing_a_setting_of_the_command_changes_the_run(variant, inputs):
    check_changes(variant, inputs, only=lambda name: name.partition(".")[0] in OWN - {"cv"})


@pytest.mark.slow
@pytest.mark.parametrize("variant", [*VARIANTS, *MORE], ids=name_of)
def test_changing_any_setting_changes_the_run(variant, inputs):
    check_changes(variant, inputs)


# -------------------------------------------------------------------------------------------------------- combinations


@pytest.mark.parametrize("method", ["reinforce", "rloo", "grpo", "dr-grpo", "reinforce-pp"])
def test_methods_without_a_critic_refuse_every_setting_of_the_critic(method):
    arguments = ["--ppo.method", method, "--ppo.samples", "4"]
    instructgpt.parse(arguments)
    numbers = {"critic_learning_rate": "1e-4", "value_coef": "0.1", "value_clip": "0.2", "lambda_": "0.9"}
    for name, value in numbers.items():
        flag = setting_checks.flag_name(f"ppo.{name}")
        with pytest.raises(
            SettingError,
            match=f"{flag.replace('ppo.', 'ppo.(no-)?')} has no effect with --ppo.method {method}, which has no critic",
        ):
            instructgpt.parse([*arguments, flag, value])


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("instructgpt", "--ppo.value-coef 0.5", "--ppo.value-coef has no effect with --ppo.critic reward"),
        ("instructgpt", "--ppo.both-kl-terms", "--ppo.both-kl-terms has no effect without --ppo.kl-loss-coef"),
        ("instructgpt", "--ppo.kl-coef 0 --ppo.kl-target 6", "--ppo.kl-target has no effect with --ppo.kl-coef 0"),
        ("instructgpt", "--ppo.kl-coef 0 --ppo.reference-ema 0.9", "--ppo.reference-ema has no effect without a KL"),
        (
            "instructgpt",
            "--ppo.method dr-grpo --ppo.samples 4 --ppo.reference-ema 0.9",
            "--ppo.reference-ema has no effect without a KL",
        ),
        ("instructgpt", "--ppo.ptx-coef 0 --ppo.ptx-ratio 2", "--ppo.ptx-ratio has no effect with --ppo.ptx-coef 0"),
        ("instructgpt", "--data.max-dropped 0.5", "--data.max-dropped has no effect without --data.path"),
        ("sweep", "--on-alarm stop", "--on-alarm has no effect in sweep.py"),
        ("sweep", "--ppo.ptx-coef 2", "--ppo.ptx-coef has no effect in sweep.py"),
        ("sweep", "--over ppo.kl_coef=0 --ppo.kl-target 6", "--ppo.kl-target has no effect with --ppo.kl-coef 0"),
        ("compare", "--ppo.method rloo --ppo.samples 2", "--ppo.method has no effect on compare.py"),
        ("compare", "--methods rloo grpo --ppo.value-clip 0.3", "--ppo.value-clip has no effect with"),
        ("compare", "--methods best-of-n --rounds 2", "--rounds has no effect with --methods best-of-n"),
        ("compare", "--methods ppo rloo --ppo.kl-loss-coef 0.1", "--ppo.kl-loss-coef has no effect with --methods ppo"),
        ("compare", "--ppo.kl-loss-coef 0.1 --ppo.both-kl-terms", "--ppo.both-kl-terms has no effect on compare.py"),
        ("compare", "--methods expert-iteration --ppo.learning-rate 0.1", "no RL method; set --sft.learning-rate"),
        ("compare", "--hosts.timeout 9", "--hosts.timeout has no effect on compare.py"),
        ("dpo", "--learning-rate 1e-4 --ppo.learning-rate 1e-4", "--ppo.learning-rate has no effect with"),
        ("dpo", "--ppo.iterations 9", "--ppo.iterations has no effect on dpo.py without --rounds"),
        ("dpo_vs_ppo", "--parts bandit --betas 1", "--betas has no effect without world in --parts"),
        ("dpo_vs_ppo", "--parts world --bandit-pairs 9", "--bandit-pairs has no effect without bandit in --parts"),
        ("dpo_vs_ppo", "--ppo.method grpo --ppo.samples 4", "--ppo.method grpo has no KL in the reward"),
        ("dpo_vs_ppo", "--parts exact --published xu", "--published xu has no effect without world"),
        ("reward_model", "--published xu", "--published xu selects settings of PPO"),
        ("dpo_vs_ppo", "--data.path x", "--data.path is not supported, .* requires a gold utility; leave it out"),
        ("reward_model", "--cv.width 32", "--cv.width has no effect without --folds"),
        ("reward_model", "--pmp.rate 0.2", "--pmp.rate has no effect without --pmp.prompts"),
        ("reward_model", "--data.path FILE --ppo.temperature 0.7", "--ppo.temperature has no effect on reward_model"),
        ("reward_model", "--model DIR --pretrain.documents 9", "--pretrain.documents has no effect on reward_model.py"),
        ("reward_model", "--sft.mix 0.2", "--sft.mix has no effect on reward_model.py"),
    ],
)
def test_settings_without_effect_in_a_combination_are_refused(command, arguments, message):
    with pytest.raises(SettingError, match=message):
        COMMANDS[command].parse(arguments.split())


def test_the_same_settings_are_accepted_where_they_have_an_effect():
    for arguments in (
        "--ppo.critic zero-head --ppo.value-coef 0.5",
        "--ppo.kl-loss-coef 0.1 --ppo.both-kl-terms",
        "--ppo.kl-coef 0 --ppo.kl-loss-coef 0.1 --ppo.reference-ema 0.9",
        "--ppo.method dr-grpo --ppo.samples 4 --ppo.kl-loss-coef 0.1 --ppo.reference-ema 0.9",
        "--ppo.value-coef 1.0 --ppo.kl-gain 0.1 --ppo.method rloo --ppo.samples 4",  # the values of the preset
    ):
        instructgpt.parse(arguments.split())  # type: ignore
    sweep.parse(["--ppo.method", "dr-grpo", "--ppo.samples", "4", "--ppo.reference-ema", "0.9"])
    sweep.parse(["--ppo.kl-loss-coef", "0.1", "--ppo.both-kl-terms"])
    sweep.parse(["--ppo.kl-loss-coef", "0.1", "--over", "ppo.kl_coef=0"])
    compare.parse(["--methods", "grpo", "--ppo.kl-loss-coef", "0.1"])
    for command in (dpo, reward_model):  # the temperature of the samples that are compared
        assert command.parse(["--ppo.temperature", "0.7"]).ppo.temperature == 0.7
    reward_model.parse(["--data.path", "FILE", "--training.normalise", "policy", "--ppo.temperature", "0.7"])
    dpo.parse(["--ppo.adam-b2", "0.9", "--ppo.weight-decay", "0.1", "--on-alarm", "stop"])


def test_the_kl_loss_in_a_comparison_of_methods_is_that_of_grpo():
    for arguments in ([], ["--methods", "grpo"]):
        asked = compare.parse([*arguments, "--ppo.kl-loss-coef", "0.1"])
        runs = {method: compare.ppo_settings(asked, method) for method in compare.RL_METHODS}
        assert {method: setting_checks.kl_loss_coef(ppo) for method, ppo in runs.items()} == {
            "ppo": 0,
            "ppo-ptx": 0,
            "rloo": 0,
            "grpo": 0.1,
        }


def test_a_refusal_gives_one_piece_of_advice():
    with pytest.raises(SettingError) as error:
        instructgpt.parse(["--ppo.method", "grpo", "--ppo.samples", "4", "--ppo.kl-coef", "0.1"])
    assert str(error.value).endswith("no KL in the reward; set --ppo.kl-loss-coef")
    with pytest.raises(SettingError) as error:
        instructgpt.parse(["--ppo.kl-gain", "0.2"])
    assert str(error.value).endswith("; leave it out")


def test_an_alarm_of_the_reward_model_stops_dpo_if_asked(inputs):
    record = {
        on_alarm: dry_run.observe(dpo, ["--preset", "smoke"], {"on_alarm": on_alarm}, inputs[0])
        for on_alarm in ("report", "stop")
    }
    assert record["report"].differences(record["stop"]) == {"reward_model: alarms"}


@pytest.mark.parametrize("paper", published_settings.PAPERS)
@pytest.mark.parametrize("method", ["ppo", "reinforce", "rloo", "grpo", "dr-grpo", "reinforce-pp"])
def test_published_settings_are_accepted_with_every_method(paper, method):
    for command in (instructgpt, sweep):
        asked = dry_run.parse(command, ["--published", paper], {"ppo.method": method, "ppo.samples": 4})
        assert (asked.ppo.method, asked.published) == (method, paper)
    dry_run.parse(compare, ["--published", paper], {})
    dry_run.parse(dpo_vs_ppo, ["--published", paper], {})


def test_a_method_without_a_critic_ignores_the_published_critic(inputs):
    for paper in ("ziegler", "xu"):
        arguments = ["--preset", "smoke", "--published", paper]
        changes = {"ppo.batch": 8, "ppo.minibatches": 1, "ppo.method": "rloo", "ppo.samples": 2}
        fits = dry_run.observe(instructgpt, arguments, changes, inputs[0]).fits
        assert not {"value_clip", "value_coef", "critic_learning_rate", "lambda_"} & fits["ppo"].used


# ------------------------------------------------------------------------------------------------- remaining settings


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(settings.Hosts)])
def test_settings_of_hosts_reach_the_rendezvous(name):
    def arguments(made):
        with mock.patch.object(hosts, "connect") as connect:
            connect.return_value.__enter__.return_value.count = 1
            with host_agreement.join_hosts(made, status=lambda error: 1):
                return connect.call_args.args, connect.call_args.kwargs | {"facts": None, "exit_status": None}  # type: ignore

    made = settings.preset("smoke")
    changed = dry_run.with_changes(made, {f"hosts.{name}": alternative(made, f"hosts.{name}")})
    assert arguments(made) == arguments(made) != arguments(changed)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(settings.Mesh)])
def test_settings_of_the_mesh_reach_the_devices(name):
    def calls(**sizes):
        made = dataclasses.replace(settings.Settings(), mesh=settings.Mesh(**sizes))
        devices = made.mesh.data * made.mesh.fsdp * made.mesh.tensor * made.mesh.sequence
        with (
            mock.patch.object(parallel, "make_mesh") as make,
            mock.patch.object(device_mesh.jax.config, "update") as update,
            mock.patch.object(device_mesh.jax, "device_count", lambda: devices),
        ):
            device_mesh.make(device_mesh.resolve(made))
            return make.call_args, update.call_args_list

    base = dict.fromkeys(mesh_settings.AXES, 2) | {"simulate": 16}
    assert calls(**base) == calls(**base) != calls(**base | {name: 2 * base[name]})


def test_the_output_folder_and_presets_change_the_run(inputs):
    arguments = ["--preset", "smoke"]
    record = dry_run.observe(reward_model, arguments, {}, inputs[0])
    other = dry_run.observe(reward_model, arguments, {"out": str(inputs[0] / "new")}, inputs[0])
    assert record.differences(other) == {"folder"}
    made = [instructgpt.parse(each) for each in ([], ["--preset", "smoke"], ["--published", "xu"])]
    assert made[0].ppo != made[1].ppo and made[0].ppo != made[2].ppo and made[0].data != made[1].data


def test_resumed_runs_have_their_saved_settings(tmp_path):
    saved = instructgpt.parse(["--published", "ziegler", "--ppo.method", "rloo", "--ppo.samples", "4"])
    run_folder.create(tmp_path / "run", saved)
    again = instructgpt.parse(["--resume", str(tmp_path / "run")])
    assert dataclasses.replace(again, resume=None) == saved
    assert json.loads((tmp_path / "run" / "config.json").read_text())["published"] == "ziegler"
