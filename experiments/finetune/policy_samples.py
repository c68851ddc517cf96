"""Samples of a policy: the evaluation before and after training, and the answers that are shown while it trains."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.cells import cell_len

from finetune import outcome
from finetune.policy_data import Prompts
from finetune.policy_rewards import Scorer
from rlhf_jax import atomic, diagnostics, kl, parallel, types
from rlhf_jax.data import chat
from rlhf_jax.train import ppo

SAMPLES = "samples.jsonl"
BEFORE, AFTER = "initial_policy", "trained_policy"
"""Names of the policies in the results."""
SHOWN = 2
"""Number of prompts whose answers are shown during training."""
TRANSCRIPTS = 8


class Sampled(NamedTuple):
    """Answers to prompts, as NumPy arrays, and their KL from the reference in nats."""

    rollout: types.Rollout
    kl_B: Any


class Sampler:
    """Samples one answer to each prompt."""

    def __init__(self, models: ppo.Models, *, temperature: float, size: int, mesh: jax.sharding.Mesh | None) -> None:
        """Builds the program; ``size`` is the maximum number of prompts that are answered together."""
        self.size, self._mesh = size, mesh
        number = np.float32(temperature)

        def run(policy: Any, reference: Any, tokens_BP: Any, mask_BP: Any, key_B: Any) -> Any:
            rollout = models.generate(policy, key_B, tokens_BP, mask_BP, number)
            logprobs_BT, reference_BT = (
                models.logprobs(each, rollout.tokens_BL, rollout.mask_BL, number)[0] for each in (policy, reference)
            )
            kl_BT = jnp.where(rollout.response_mask_BT, kl.k1(logprobs_BT, reference_BT), 0.0)
            return Sampled(rollout, kl_BT.sum(axis=1))

        self._run = parallel.JitStep(run, donate_argnums=(), mesh=mesh, batch_args=(2, 3, 4), replicated_args=())

    def __call__(self, policy: Any, reference: Any, prompts: Prompts, key: jax.Array) -> Sampled:
        """Returns the answers; they depend on the policy, ``key`` and the prompts."""
        rows = prompts.tokens_BP, prompts.mask_BP, jax.random.split(key, len(prompts))
        call = partial(self._run, policy, reference)
        return outcome.in_chunks(lambda each: call(*each), rows, size=min(self.size, len(prompts)), mesh=self._mesh)


class Measured(NamedTuple):
    """Answers of a policy to the held-out prompts, with their scores."""

    sampled: Sampled
    scores: dict[str, np.ndarray]


def compare(before: Measured, after: Measured, prompts: Prompts) -> dict[str, Any]:
    """Returns the results of both policies on the same prompts, each mean with its clustered 95 % interval."""
    mean = partial(_mean, asked_B=prompts.asked_B)
    reward, old = after.scores["reward"], before.scores["reward"]
    win_rate = mean(diagnostics.win_outcomes(reward, old), rate=True)
    rows = {BEFORE: _numbers(before, prompts), AFTER: _numbers(after, prompts) | {"win_rate": win_rate}}
    diversity, pairs = _diversity(before.sampled, after.sampled, prompts)
    for row, found in zip(rows.values(), diversity):
        row |= found
    return {
        "policies": rows,
        "baseline": BEFORE,
        "clusters": {"evaluation": len(np.unique(prompts.asked_B))},
        "reward_change": mean(reward - old),
        "diversity_pairs": pairs,
    }


def _mean(values: Any, *, asked_B: np.ndarray, rate: bool = False) -> list[float]:
    return list(diagnostics.clustered_mean(np.asarray(values, np.float64), asked_B.tolist(), rate=rate))


def _numbers(measured: Measured, prompts: Prompts) -> dict[str, Any]:
    mean, rollout = partial(_mean, asked_B=prompts.asked_B), measured.sampled.rollout
    parts = {name: mean(scores) for name, scores in measured.scores.items() if name != "reward"}
    return {
        "reward": mean(measured.scores["reward"]),
        **({f"reward_{name}": part for name, part in parts.items()} if len(parts) > 1 else {}),
        "kl": mean(measured.sampled.kl_B),
        "length": mean(rollout.lengths_B),
        "stopped": mean(np.asarray(rollout.finish_B) == 1, rate=True),
    }


def _diversity(before: Sampled, after: Sampled, prompts: Prompts) -> tuple[list[dict[str, Any]], int]:
    """Returns the diversity of both policies' answers, at equally many pairs of tokens, and the ratio of entropies.

    The entropies are estimated from the log-probabilities of the answers. The number of pairs is also returned.
    """
    P = prompts.tokens_BP.shape[1]
    rollouts = before.rollout, after.rollout
    sets = [
        [row[P:][mask].tolist() for row, mask in zip(each.tokens_BL, each.response_mask_BT)]  # pyright: ignore
        for each in rollouts
    ]
    columns = [(-np.asarray(each.logprobs_BT, np.float64).sum(axis=1), each.lengths_B) for each in rollouts]
    ratio = diagnostics.entropy_ratio(*columns[1], *columns[0], clusters=prompts.asked_B.tolist())
    rows: list[dict[str, Any]] = [
        {"diversity": distinct, "self_bleu": diagnostics.self_bleu(each)}
        for distinct, each in zip(diagnostics.equal_distinct_n(sets, n=2), sets)
    ]
    rows[1]["entropy_ratio"] = list(ratio)
    return rows, diagnostics.fewest_ngrams(sets, n=2)


def table(results: dict[str, Any]) -> list[tuple[str, Any]]:
    """Returns the rows of the table that is printed at the end of a run."""
    rows: list[tuple[str, Any]] = []
    if found := results.get("policies"):
        before, after = found[BEFORE], found[AFTER]
        names = [name for name in after if name.startswith("reward")]
        for name in (*names, "length", "stopped"):
            shown = name.replace("_", " ", 1)  # the rest is the name of a function
            rows += [(f"{shown} before", before[name]), (f"{shown} after", after[name])]
        rows.insert(2, ("change of the reward", results["reward_change"]))
        rows.insert(3, ("win rate of after against before", after["win_rate"]))
        rows.insert(4, ("KL from the reference after, nats per answer", after["kl"]))
        if "entropy_ratio" in after:  # not in the results of earlier versions
            rows.append(("entropy per token, after relative to before", after["entropy_ratio"]))
    return [*rows, ("iterations", results["iterations"]), ("sampled tokens per second", results["tokens_per_second"])]


def texts(scorer: Scorer, rollout: types.Rollout) -> list[str]:
    """Returns the texts of answers, without special tokens."""
    mask_BT = np.asarray(rollout.response_mask_BT)
    P = np.asarray(rollout.tokens_BL).shape[1] - mask_BT.shape[1]
    return [scorer.text(row[P:][mask].tolist()) for row, mask in zip(np.asarray(rollout.tokens_BL), mask_BT)]


def transcripts(scorer: Scorer, prompts: Prompts, measured: Mapping[str, Measured]) -> list[dict[str, Any]]:
    """Returns the answers of both policies to the first held-out prompts, for the report."""
    shown = {name: texts(scorer, each.sampled.rollout) for name, each in measured.items()}
    return [
        {
            "prompt": _prompt_text(record),
            "answers": {name: each[i] for name, each in shown.items()},
            "gold": {name: float(each.scores["reward"][i]) for name, each in measured.items()},
        }
        for i, record in enumerate(prompts.records[:TRANSCRIPTS])
    ]


def _prompt_text(record: Any) -> str:
    return "\n".join(f"{turn.role}: {turn.text}" for turn in record.prompt)


def make_show(
    folder: pathlib.Path,
    sampler: Sampler,
    scorer: Scorer,
    prompts: Prompts,
    *,
    every: int,
    last: int,
    key: jax.Array,
    policy_of: Callable[[Any], Any],
    frozen: ppo.Frozen,
    say: Callable[[str], None],
) -> Callable[[int, Any, Any], None]:
    """Returns a callback of `loop.fit` that shows the policy's answers to the first prompts.

    The answers are written to samples.jsonl. Lines of iterations that are run again after a resume are replaced.

    Args:
        folder: The run folder.
        sampler: The sampler.
        scorer: The rewards.
        prompts: The prompts, of which the first ones are answered.
        every: Number of iterations between answers.
        last: The last iteration, after which answers are shown too.
        key: Random key.
        policy_of: Returns the parameters of the policy from those of the state.
        frozen: The reference and the reward models.
        say: Prints a line above the progress bar.
    """
    shown = prompts.at(range(min(SHOWN, len(prompts))))
    path, first = folder / SAMPLES, True

    def show(done: int, state: Any, metrics: Any) -> None:
        nonlocal first
        if first:
            _keep_before(path, done)
        first = False
        if done % every and done != last:
            return
        reference = frozen.reference if state.reference is None else state.reference
        policy = policy_of(state.params)
        sampled = sampler(policy, reference, shown, jax.random.fold_in(key, done))
        scores = scorer.measure(frozen.reward, sampled.rollout, size=len(shown))
        for i, text in enumerate(texts(scorer, sampled.rollout)):
            prompt = chat.messages(shown.records[i].prompt)
            numbers = {name: float(values[i]) for name, values in scores.items()}
            line = {"step": done, "prompt": prompt, "response": text, **numbers, "kl": float(sampled.kl_B[i])}
            atomic.append_line(path, line)
            question = _short(str(prompt[-1]["content"]), 50)
            say(f"step {done}, reward {numbers['reward']:.3g}: {question} → {_short(text, 110)}")

    return show


def _keep_before(path: pathlib.Path, step: int) -> None:
    """Removes the lines of a file from ``step`` on."""
    if path.exists():
        atomic.repair_last_line(path)
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if json.loads(line)["step"] < step]
        atomic.replace_file(path, "".join(f"{line}\n" for line in lines).encode())


def _short(text: str, width: int) -> str:
    text = " ".join(text.split())
    return text if cell_len(text) <= width else text[: width - 1] + "…"
