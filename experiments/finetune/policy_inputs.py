"""Loads and checks the models, rewards and prompts of ppo.py."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
from launch import initial_model, run_folder
from recipe import engine, rl_methods

from finetune import policy_data, policy_rewards, policy_settings, reward_functions, stage_run
from finetune.policy_settings import NEW_HEAD, ZERO_HEAD, PPOSettings
from rlhf_jax import types
from rlhf_jax.data import errors


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The models, rewards and data of a run."""

    policy: initial_model.InitialModel
    reference: types.Params
    rewards: policy_rewards.Rewards
    critic: initial_model.InitialModel | None
    """The initial critic; None if the policy gets a new head, or if the method has no critic."""
    prompts: policy_data.Prompts
    """All prompts."""
    train: policy_data.Prompts
    held_out: policy_data.Prompts
    ptx: types.TokenBatch | None


def stage_of(settings: PPOSettings) -> str:
    """Returns the name of the training stage."""
    return "ppo" if settings.ptx is None else "ppo_ptx"


def _stages(settings: PPOSettings, prompts: int) -> list[tuple[str, float]]:
    """Returns the stages with the work of each, in forward passes of an answer."""
    method = policy_settings.method(settings)
    update = 3.0 * method.epochs * (2 if rl_methods.has_critic(method) else 1)
    held_out = min(settings.held_out * prompts, policy_data.MOST_HELD_OUT)
    answer = 6.0  # sampling, and scoring by the policy, the reference and the rewards
    return [
        (stage_of(settings), method.iterations * method.batch * (answer + update)),
        ("evaluate", 2 * held_out * answer),
    ]


def prepare(resolved: PPOSettings, mesh: Any, counts: errors.DropCount) -> stage_run.Prepared:
    """Loads and checks all inputs; what can be checked without loading a model is checked first."""
    functions = policy_rewards.find_functions(resolved)
    language, reward = initial_model.LANGUAGE_MODEL, initial_model.REWARD_MODEL
    given = [("--policy", resolved.policy, language), ("--reference", resolved.reference, language)]
    given += [("--reward-model", each, reward) for each in resolved.reward_model]
    given += [] if resolved.critic in (NEW_HEAD, ZERO_HEAD) else [("--critic", resolved.critic, reward)]
    for flag, path, kind in given:
        if path is not None:
            initial_model.check(path, kind=kind, flag=flag)
    load: Any = partial(initial_model.load, mesh=mesh)
    policy = load(resolved.policy, flag="--policy", template=resolved.template)
    policy = dataclasses.replace(policy, cfg=initial_model.with_compute(policy.cfg, resolved.compute))
    compatible = partial(policy_rewards.load_compatible, policy=policy, mesh=mesh, compute=resolved.compute)
    found = policy_rewards.load(resolved, functions, policy, mesh)
    critic = None
    if rl_methods.has_critic(policy_settings.method(resolved)):
        if resolved.critic is None:
            critic = next(iter(found.models.values()), None)
        elif resolved.critic not in (NEW_HEAD, ZERO_HEAD):
            critic = compatible(resolved.critic, "--critic")
    reference = policy.params
    if resolved.reference is not None:
        other = compatible(resolved.reference, "--reference", kind=initial_model.LANGUAGE_MODEL)
        if other.cfg != policy.cfg:
            raise run_folder.SettingError(
                f"cannot use --reference {resolved.reference}: its architecture differs from that of --policy "
                f"{resolved.policy}; give a model of the same size and family"
            )
        reference = other.params
    prompts, note = policy_data.read_prompts(
        policy, resolved.prompts, width=resolved.prompt_width, max_new_tokens=resolved.max_new_tokens, counts=counts
    )
    width = prompts.tokens_BP.shape[1] + resolved.max_new_tokens
    named = {f"--reward-model {each.path}": each for each in found.models.values()}
    for name, each in (named | ({} if critic is None else {"the critic": critic})).items():
        if each.cfg.max_length < width:
            raise run_folder.SettingError(
                f"cannot use {name}: a prompt and its answer have up to {width} tokens, more than its maximum length "
                f"{each.cfg.max_length}; lower --max-new-tokens or --prompt-width"
            )
    ptx = None if resolved.ptx is None else policy_data.read_ptx(policy.fmt, resolved.ptx, width=width)
    key = jax.random.fold_in(engine.stage_key(resolved.seed, stage_of(resolved)), 2)
    train, held_out = policy_data.split(prompts, resolved.held_out, key)
    inputs = Inputs(policy, reference, found, critic, prompts, train, held_out, ptx)
    return stage_run.Prepared(
        policy,
        inputs,
        {"training prompts": len(train), "held-out prompts": len(held_out)},
        _stages(resolved, len(prompts)),
        remark=reward_functions.note_of_read_columns(functions, counts, prompts.records),
        notes=[*policy_data.few_left(train, held_out), *([] if note is None else [note])],
    )
