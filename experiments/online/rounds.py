"""The rounds of HH: comparison sets, preference models and policies, each from scratch (Bai et al. 2022, 4.5)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from recipe import jobs

from online import comparison_sets, domains, hh_settings, policies, preference_models
from online.hh_settings import HHSettings
from rlhf_jax import diagnostics, types

J = TypeVar("J", bound=jobs.Job)

START, STATIC = "SFT", "static"
EVAL_PROMPTS, _RL_PROMPTS = 901, 900
"""Numbers of the random streams of prompts; those of the comparison sets are smaller."""


class Made(NamedTuple):
    """What the rounds made."""

    policies: dict[str, types.Params]
    """The SFT model, the final policy of each round, and the static policy."""
    rewards: list[types.Params]
    """The preference model of each round."""
    sets: list[comparison_sets.Sets]
    static_reward: types.Params | None
    static_pairs: int

    @property
    def final(self) -> types.Params:
        """The policy of the last round."""
        return self.policies[f"round {len(self.rewards)}"]


def with_prompts(job: J, red_team: float) -> J:
    """Returns the job with RL prompts of which the share ``red_team`` are requests for help with harm."""
    ppo = job.settings.ppo
    n = ppo.iterations * ppo.batch // ppo.samples
    mixed = domains.mixed_prompts(job.settings, job.task, n, red_team=red_team, split="train", number=_RL_PROMPTS)
    task = dataclasses.replace(job.task, rl_prompts=mixed)
    return dataclasses.replace(job, task=task, sampler=job.sampler.with_task(task))


def weights(settings: HHSettings) -> list[tuple[str, float]]:
    """Returns the stages after the SFT model, with their expected durations in seconds."""
    rounds, snapshots = len(settings.online.sets), settings.online.snapshots
    found = []
    for r in range(1, rounds + 1):
        found += [(f"comparisons-{r}", 8.0), (f"reward_model-{r}", 4.0 + 4.0 * r)]
        found += [(stage, 40.0 / snapshots) for stage in _segments(f"ppo-{r}", snapshots)]
    if settings.online.static and rounds > 1:
        found += [(f"comparisons-{comparison_sets.STATIC_SET}", 10.0), ("reward_model-static", 4.0 + 4.0 * rounds)]
        found += [(stage, 40.0 / snapshots) for stage in _segments("ppo-static", snapshots)]
    return [*found, ("evaluate", 15.0)]


def rl_stages(settings: HHSettings) -> list[str]:
    """Returns the names of the RL stages."""
    return [stage for stage, _ in weights(settings) if stage.startswith("ppo-")]


def _segments(name: str, snapshots: int) -> list[str]:
    return [policies.segment(name, i) for i in range(snapshots)]


def run(
    job: jobs.Job,
    start: types.Params,
    online: hh_settings.Online,
    pm: hh_settings.PreferenceModel,
    *,
    log: Callable[[str], Any],
    collect_set: Callable[..., comparison_sets.Sets] = comparison_sets.collect,
) -> Made:
    """Runs all rounds, and trains the static policy.

    Args:
        job: The job of the run, with the prompts of RL.
        start: The SFT model.
        online: The settings of the rounds.
        pm: The settings of the preference models.
        log: Returns the log of a stage of RL, given its name.
        collect_set: Collects a comparison set, as `comparison_sets.collect` does.
    """
    step = preference_models.make_step(job, separate=pm.separate)
    sets: list[comparison_sets.Sets] = []
    rewards: list[types.Params] = []
    snapshots: list[list[types.Params]] = []

    def train(rows: types.Comparisons, name: str, number: int) -> tuple[types.Params, list[types.Params]]:
        model = preference_models.train(
            job,
            step,
            start,
            rows,
            name=f"reward_model-{name}",
            number=number,
            batch=pm.batch,
            separate=pm.separate,
            harmless_weight=pm.harmless_weight,
        )
        reward = preference_models.as_reward(job, model, start, score_weights=pm.score_weights)
        return reward, policies.train(job, start, reward, name=f"ppo-{name}", snapshots=online.snapshots, log=log)

    def collect(
        answerers: list[comparison_sets.Answerer], number: int, pairs: int, held_out: int
    ) -> comparison_sets.Sets:
        red_team = round(pairs * online.red_team)
        return collect_set(
            job,
            answerers,
            number=number,
            pairs={"helpful": pairs - red_team, "harmless": red_team},
            held_out=held_out,
            temperature=sets[0].facts.get("labeler_temperature") if sets else None,
        )

    for r, source in enumerate(online.sets, start=1):
        answerers = [comparison_sets.policy_answers(job, start)]
        if source == "rejection" and rewards:
            answerers = [comparison_sets.best_of_answers(job, start, rewards[-1], samples=online.rejection)]
        elif source == "online" and rewards:
            shown = [each[-1] for each in snapshots[:-1]] + snapshots[-1]
            answerers = [comparison_sets.policy_answers(job, each) for each in shown]
        sets.append(collect(answerers, r, online.pairs, online.held_out))
        rows = comparison_sets.merge([each.train for each in sets])
        reward, found = train(rows, str(r), r)
        rewards.append(reward)
        snapshots.append(found)
    named = {START: start} | {f"round {r}": each[-1] for r, each in enumerate(snapshots, start=1)}
    static_reward, static_pairs = None, 0
    if online.static and len(sets) > 1:
        # As many pairs of each domain that the labelers do not find equal as the rounds have.
        wanted = comparison_sets.merge([each.train for each in sets])
        answerers = [comparison_sets.policy_answers(job, start)]
        more = collect(answerers, comparison_sets.STATIC_SET, online.pairs * len(sets), 0)
        rows = comparison_sets.merge([sets[0].train, more.train])
        counts, available = (
            {each: len(comparison_sets.of_domain(part, each).ranks_BK) for each in domains.DOMAINS}
            for part in (wanted, rows)
        )
        rows = comparison_sets.first(rows, {each: min(counts[each], available[each]) for each in domains.DOMAINS})
        static_pairs = len(rows.ranks_BK)
        static_reward, found = train(rows, "static", comparison_sets.STATIC_SET)
        named[STATIC] = found[-1]
    return Made(named, rewards, sets, static_reward, static_pairs)


def evaluate(job: jobs.Job, sources: Sequence[comparison_sets.Source], made: Made) -> dict[str, Any]:
    """Returns Elo scores, gold utilities, and the accuracy of each preference model on each comparison set."""
    job.progress.start("evaluate", 2 * len(made.policies))
    n = job.settings.evaluation.prompts
    found: dict[str, Any] = {name: {} for name in made.policies}
    worth: dict[str, list[np.ndarray]] = {"helpful": [], "harmless": []}
    total: list[list[np.ndarray]] = [[] for _ in made.policies]
    asked: dict[str, np.ndarray] = {}
    for d, domain in enumerate(domains.DOMAINS):
        prompts = domains.draw_prompts(
            job.settings,
            job.task,
            n if domain == "helpful" else n // 2,
            domain=domain,
            split="test",
            number=EVAL_PROMPTS,
        )
        answers = policies.answer_all(
            job,
            made.policies,
            prompts,
            start=made.policies[START],
            reward=made.rewards[-1],
            key=jax.random.fold_in(job.key("evaluate"), d),
            done=d * len(made.policies),
        )
        asked[domain] = prompts.asked_B
        for m, (name, each) in enumerate(answers.items()):
            found[name][domain] = policies.measured(each, prompts.asked_B, domain)
            worth[domain].append(domains.worth(each, domain))
            total[m].append(np.asarray(each.gold.total))
    job.progress.finish("evaluate")
    strengths = {domain: policies.elo(worth[domain], asked[domain]) for domain in domains.DOMAINS}
    both = np.concatenate([asked["helpful"], asked["harmless"] + 1 + asked["helpful"].max()])
    strengths["overall"] = policies.elo([np.concatenate(each) for each in total], both)
    elos = {criterion: dict(zip(found, map(list, each.elo(reference=0)))) for criterion, each in strengths.items()}
    names = list(found)
    facts: dict[str, Any] = {"policies": found, "elo": elos}
    if STATIC in names:
        last = names.index(f"round {len(made.rewards)}")
        facts["iterated_minus_static_elo"] = {
            criterion: [diagnostics.ELO_PER_NAT * x for x in each.difference(last, names.index(STATIC))]
            for criterion, each in strengths.items()
        }
        facts["static_pairs"] = made.static_pairs
    return facts | {
        "sets": [
            {"source": source, "pairs": len(each.train.ranks_BK), **each.facts}
            for source, each in zip(sources, made.sets)
        ],
        "preference_models": _accuracies(job, made),
    }


def _accuracies(job: jobs.Job, made: Made) -> dict[str, list[dict[domains.Domain, list[float]]]]:
    """Returns the accuracy of each preference model on the held-out pairs of each set, by domain."""
    models = {f"round {r}": reward for r, reward in enumerate(made.rewards, start=1)}
    if made.static_reward is not None:
        models[STATIC] = made.static_reward
    return {
        name: [preference_models.accuracy(job, reward, each.held_out, each.held_out_asked_B) for each in made.sets]
        for name, reward in models.items()
    }
