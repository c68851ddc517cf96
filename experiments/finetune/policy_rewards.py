"""The rewards of ppo.py: reward models and functions of the user, combined in a weighted sum."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from launch import initial_model
from launch.run_settings import SettingError
from recipe import engine

from finetune import answers, outcome, policy_settings
from finetune.policy_data import Prompts
from finetune.reward_functions import RewardFunction
from rlhf_jax import lm, parallel, rewards, types
from rlhf_jax.data import chat

ENSEMBLE = "model"
"""Name of the reward of an ensemble of all reward models."""
NORMALISED_ON = 256
"""Maximum number of answers on which the scores of reward models are normalised."""


@dataclasses.dataclass(frozen=True)
class Rewards:
    """Reward models and functions, by name, with their weights."""

    models: dict[str, initial_model.InitialModel]
    functions: dict[str, RewardFunction]
    weights: dict[str, float]
    """Weights of the models and the functions; an ensemble of all models has one, by the name `ENSEMBLE`."""
    ensemble: bool = False
    """Whether the models and their heads form an ensemble."""
    worst_case: bool = False
    """Whether the reward of the ensemble is its lowest score, instead of the mean with a penalty for disagreement."""

    @property
    def failure(self) -> SettingError | None:
        """The error of the function that failed in its last call, if any."""
        return next((each.failure for each in self.functions.values() if each.failure is not None), None)


def find_functions(settings: Any) -> list[RewardFunction]:
    """Returns the functions of --reward; raises SettingError if one cannot be called, before any model is loaded."""
    return [RewardFunction(spec) for spec in settings.reward]


def load(
    settings: Any,
    functions: Sequence[RewardFunction],
    policy: initial_model.InitialModel,
    mesh: jax.sharding.Mesh | None,
) -> Rewards:
    """Loads the reward models of the settings and combines them with ``functions``.

    Raises:
        SettingError: One of the models is unusable.
    """
    loaded: list[tuple[str, Any]] = []
    ensemble, members = policy_settings.is_ensemble(settings), 0
    for path in settings.reward_model:
        model = load_compatible(path, "--reward-model", policy, mesh, compute=settings.compute)
        heads = lm.heads.count_heads(model.params)
        if heads is not None and not ensemble:
            raise SettingError(
                f"cannot use --reward-model {path}: it has {heads} heads; use them as an ensemble with "
                "--ppo.uncertainty or --ppo.worst-case, or combine them with lm.heads.combine and save the model"
            )
        loaded.append(("model", model))
        members += heads or 1
    if ensemble and members < 2:
        flag = "worst-case" if settings.ppo.worst_case else "uncertainty"
        raise SettingError(
            f"--ppo.{flag} needs an ensemble, but --reward-model {settings.reward_model[0]} has one head; give several "
            "models, or one with several heads (--training.heads and --training.keep-heads of reward_model.py)"
        )
    loaded += [(function.name, function) for function in functions]
    names: list[str] = []
    for name, _ in loaded:
        n = 1 + sum(each == name or each.rpartition("_")[0] == name for each in names)
        names.append(name if n == 1 else f"{name}_{n}")
    rewarded = [ENSEMBLE, *names[len(settings.reward_model) :]] if ensemble else names
    weights = settings.reward_weights or (1.0,) * len(rewarded)
    parts = dict(zip(names, (each for _, each in loaded)))
    return Rewards(
        {name: each for name, each in parts.items() if isinstance(each, initial_model.InitialModel)},
        {name: each for name, each in parts.items() if isinstance(each, RewardFunction)},
        dict(zip(rewarded, map(float, weights))),
        ensemble,
        settings.ppo.worst_case,
    )


def load_compatible(
    path: str,
    flag: str,
    policy: initial_model.InitialModel,
    mesh: jax.sharding.Mesh | None,
    *,
    compute: Any,
    kind: str = initial_model.REWARD_MODEL,
) -> initial_model.InitialModel:
    """Loads a model that reads what the policy writes.

    Args:
        path: The folder.
        flag: The flag that names it.
        policy: The policy.
        mesh: The mesh over which parameters are sharded; None for one device.
        compute: The number format of the settings.
        kind: The kind of model, from `initial_model`.

    Raises:
        SettingError: The folder has no such model, or its token ids differ from the policy's.
    """
    model = initial_model.load(path, kind=kind, flag=flag, mesh=mesh)
    own, other = (each.fmt.tokenizer.get_vocab() for each in (policy, model))
    if own != other:
        n = sum(other.get(token) != i for token, i in own.items())
        raise SettingError(
            f"cannot use {flag} {path}: its tokenizer differs from that of --policy ({n} of {len(own)} tokens have "
            "another id or none), so it would read other words than the policy writes; give a model that was trained "
            "with the policy's tokenizer"
        )
    return dataclasses.replace(model, cfg=initial_model.with_compute(model.cfg, compute))


class Scorer:
    """Scores answers with reward models and functions, within the train step and outside it."""

    def __init__(self, found: Rewards, fmt: chat.ChatFormat, prompts: Prompts, mesh: jax.sharding.Mesh | None) -> None:
        """Builds the programs of the reward models; ``prompts`` are all prompts that can be answered."""
        self.found, self._fmt, self._mesh = found, fmt, mesh
        self._records = {
            _key(row, mask): record for row, mask, record in zip(prompts.tokens_BP, prompts.mask_BP, prompts.records)
        }
        self._width = prompts.tokens_BP.shape[1]
        program = partial(parallel.JitStep, donate_argnums=(), mesh=mesh, batch_args=(1, 2), replicated_args=())
        self._programs = {
            name: program(
                lambda params, tokens_BL, mask_BL, cfg=model.cfg: lm.score(params, tokens_BL, cfg=cfg, mask_BL=mask_BL)
            )
            for name, model in found.models.items()
        }

    def score(self, params: Mapping[str, Any], rollout: types.Rollout) -> Any:
        """Returns the weighted sum of the rewards, as `ppo.Models.score` does, and the parts if there are several.

        ``params["parts"]`` maps the names of the reward models to their parameters. For an ensemble, its standard
        deviation is returned as ``reward_disagreement``.
        """
        parts: dict[str, jax.Array] = {}
        for name, model in self.found.models.items():
            model_params = params["parts"][name]
            parts[name] = lm.score(model_params, rollout.tokens_BL, cfg=model.cfg, mask_BL=rollout.mask_BL)
        extra: dict[str, jax.Array] = {}
        if self.found.ensemble:
            scores_BK = _members(parts, jnp)
            parts = {ENSEMBLE: self._of_ensemble(params, scores_BK)}
            extra["reward_disagreement"] = jnp.std(scores_BK, axis=1)
        whole = self._replicated(rollout)
        for name, function in self.found.functions.items():
            call = rewards.from_python(partial(self._call, function), per_token=bool(function.per_token))
            parts[name] = self._replicated(call(None, whole))
        total = rewards.weighted({name: _part for name in parts}, self.found.weights)(parts, rollout)
        if len(parts) == 1:
            return (total, extra) if extra else total
        sums = {name: part if part.ndim == 1 else part.sum(axis=1) for name, part in parts.items()}
        return total, {f"reward_{name}": part for name, part in sums.items()} | extra

    def _of_ensemble(self, params: Mapping[str, Any], scores_BK: Any) -> jax.Array:
        if self.found.worst_case:
            return scores_BK.min(axis=1)
        return rewards.penalise_disagreement(scores_BK, coef=params["penalty"])

    def _replicated(self, tree: Any) -> Any:
        """Replicates arrays of a program, because a function on the host needs and returns all rows."""
        if self._mesh is None:
            return tree
        sharding = jax.sharding.NamedSharding(self._mesh, jax.sharding.PartitionSpec())
        return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, sharding), tree)

    def measure(self, params: Mapping[str, Any], sampled: types.Rollout, *, size: int) -> dict[str, np.ndarray]:
        """Returns the scores of answers by name of the reward, and their weighted sum as ``reward``, all ``[B]``."""
        parts = self.parts(params, sampled, size=size)
        if self.found.ensemble:
            functions = {name: parts[name] for name in self.found.functions}
            scores_BK = _members({name: parts[name] for name in self.found.models}, np)
            parts = {ENSEMBLE: np.asarray(self._of_ensemble(params, scores_BK)), **functions}
            parts["disagreement"] = scores_BK.std(axis=1)
        total = sum(weight * np.float64(parts[name]) for name, weight in self.found.weights.items())
        return {"reward": np.asarray(total), **parts}

    def parts(self, params: Mapping[str, Any], sampled: types.Rollout, *, size: int) -> dict[str, np.ndarray]:
        """Returns the scores of each model, ``[B]`` or ``[B, heads]``, and of each function, ``[B]``."""
        arrays = np.asarray(sampled.tokens_BL), np.asarray(sampled.mask_BL)
        parts: dict[str, np.ndarray] = {}
        for name, program in self._programs.items():
            call = partial(program, params["parts"][name])
            parts[name] = outcome.in_chunks(lambda rows, call=call: call(*rows), arrays, size=size, mesh=self._mesh)
        for name, function in self.found.functions.items():
            scores = self._call(function, *arrays, np.asarray(sampled.response_mask_BT))
            parts[name] = scores.sum(axis=1) if scores.ndim == 2 else scores
        return parts

    def _call(
        self, function: RewardFunction, tokens_BL: np.ndarray, mask_BL: np.ndarray, response_mask_BT: np.ndarray
    ) -> np.ndarray:
        """Returns the scores of a function of the user, ``[B]`` or ``[B, T]``."""
        P = self._width
        records = [self._records[_key(row[:P], mask[:P])] for row, mask in zip(tokens_BL, mask_BL)]
        ids = [row[P:][mask].tolist() for row, mask in zip(tokens_BL, response_mask_BT)]
        tokenizer: Any = self._fmt.tokenizer
        scores = function(
            [chat.messages(record.prompt) for record in records],
            [self.text(each) for each in ids],
            [[tokenizer.decode([i]) for i in each] for each in ids],
            [record.metadata for record in records],
        )
        if not function.per_token:
            return np.asarray(scores, np.float32)
        scores_BT = np.zeros(response_mask_BT.shape, np.float32)
        for row_T, each in zip(scores_BT, scores):
            row_T[: len(each)] = each  # type: ignore[arg-type]
        return scores_BT

    def text(self, ids: list[int]) -> str:
        """Returns the text of an answer without special tokens."""
        stopped = bool(ids) and ids[-1] in self._fmt.stop_ids
        return answers.text_of(self._fmt, ids, stopped=stopped)


def _key(tokens_P: np.ndarray, mask_P: np.ndarray) -> tuple[bytes, bytes]:
    """Returns a key that includes the padding, which tells prompts with equal tokens apart; see `policy_data`."""
    return np.asarray(tokens_P, np.int32).tobytes(), np.asarray(mask_P, bool).tobytes()


def _members(parts: Mapping[str, Any], xp: Any) -> Any:
    """Returns the scores of all heads of all models side by side, ``[B, K]``; ``xp`` is NumPy or `jax.numpy`."""
    return xp.concatenate([part[:, None] if part.ndim == 1 else part for part in parts.values()], axis=1)


def one_head(params: types.Params) -> types.Params:
    """Returns a reward model with one head, the average of its heads, as a critic must have."""
    heads = lm.heads.count_heads(params)
    return params if heads is None else lm.heads.combine(params, jnp.full(heads, 1 / heads))


def _part(part: jax.Array, rollout: types.Rollout) -> jax.Array:
    return part


def parameters(
    job: engine.Engine, scorer: Scorer, sample: Callable[[], types.Rollout], *, normalise: bool, size: int
) -> dict[str, Any]:
    """Returns the parameters of the reward models by name, normalised on samples of the policy if asked.

    Calls each reward function once, so that errors are found before training.

    Args:
        job: The job.
        scorer: The rewards.
        sample: Returns answers of the policy.
        normalise: Whether scores of reward models are scaled to mean 0 and standard deviation 1.
        size: Number of answers that are scored together.
    """
    params = {"parts": {name: model.params for name, model in scorer.found.models.items()}}
    if not normalise and not scorer.found.functions:
        return params["parts"]
    scores = scorer.parts(params, sample(), size=size)
    if not normalise:
        return params["parts"]
    return {
        name: job.put_params(lm.heads.standardise(each, job.replicate(scores[name])))
        for name, each in params["parts"].items()
    }
