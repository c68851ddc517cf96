"""Labels of the pairs of hh.py from a judge or from people, instead of simulated labelers."""

from __future__ import annotations

import dataclasses
import itertools
import math
import pathlib
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from constitution import constitution_settings, judge_settings, own_models, own_run, red_team
from recipe import jobs, world_words

from online import comparison_sets, domains
from online.hh_settings import HHSettings
from rlhf_jax import checkpoint, diagnostics, feedback, types
from rlhf_jax.data import dialogues, errors
from rlhf_jax.feedback import few_shot, judgements, store
from rlhf_jax.feedback.labelers import labeler_agreement
from rlhf_jax.simulation import harm_judge

HELPFULNESS = "Which reply is more helpful?"
STORE = "comparisons.sqlite"
"""Name of the comparison store in a run folder."""
_BATCH = 16
"""Number of questions that a judge in a folder reads at a time."""


class Waiting(Exception):
    """Raised where a run ends because labels are missing. The message says what to do."""


class Asked(NamedTuple):
    """A part of a set, as a source of labels sees it."""

    part: comparison_sets.Part
    items: list[judgements.Item]
    """The pairs, whose metadata have their round, part and number as "pair"."""
    gold_B2: np.ndarray
    """What the domain asks for, which only the agreement with the labels uses."""

    @property
    def different_B(self) -> np.ndarray:
        """Whether the two answers of each pair differ."""
        texts = [[each.text for each in item.completions] for item in self.items]
        return np.array([first != second for first, second in texts], bool)


class Preferences(NamedTuple):
    """The labels of the parts of a set, in order, and facts about them."""

    preference_B: list[np.ndarray]
    """Probability that the first answer is better; NaN for pairs that are discarded."""
    facts: dict[str, Any]


Source = Callable[[jobs.Job, str, list[Asked], float | None], Preferences]
"""Labels the parts of a set, given its stage and the noise of the simulated labelers, None for the first set."""


def sample_and_ask(
    job: jobs.Job,
    answerers: Sequence[comparison_sets.Answerer],
    *,
    source: Source,
    number: int,
    pairs: Mapping[domains.Domain, int],
    held_out: int,
    temperature: float | None,
) -> comparison_sets.Sets:
    """Does what `comparison_sets.sample_and_label` does with the labels of a source; saves the answers."""
    stage = f"comparisons-{number}"
    with job.checkpoints(f"pairs-{number}") as checkpoints:
        last = checkpoints.latest() or 0
        try:
            saved = _restored(checkpoints.restore(None)[1]) if last else None
        except checkpoint.CheckpointError as error:
            job.note(stage, f"the answers are sampled again, because {error}")
            saved = None
        parts = comparison_sets.sample(job, answerers, number=number, pairs=pairs, held_out=held_out, saved=saved)
        if saved is None:
            arrays = {
                part.name: {
                    "tokens_BKL": np.asarray(part.rows.tokens_BKL),
                    "mask_BKL": np.asarray(part.rows.mask_BKL),
                    "features_B2F": part.features_B2F,
                }
                for part in parts
            }
            checkpoints.save(last + 1, arrays, {})
    found = source(job, stage, [_asked(job, part, number) for part in parts], temperature)
    labelled = [(part, *with_preferences(part, preference_B)) for part, preference_B in zip(parts, found.preference_B)]
    if not any(kept_B.any() for part, _, kept_B in labelled if part.split == "train"):
        raise errors.DataError(f"{stage}: none of the training pairs has a preferred answer, so nothing can be learned")
    return comparison_sets.joined(labelled, found.facts)


def _restored(arrays: Any) -> dict[str, tuple[types.Comparisons, np.ndarray]]:
    found = {}
    for name, each in arrays.items():
        tokens_BKL, mask_BKL = np.asarray(each["tokens_BKL"]), np.asarray(each["mask_BKL"])
        found[name] = comparison_sets.unlabelled(tokens_BKL, mask_BKL), np.asarray(each["features_B2F"])
    return found


def _asked(job: jobs.Job, part: comparison_sets.Part, number: int) -> Asked:
    """Returns a part with its texts and their gold utilities."""
    n, P = len(part.prompts), job.task.prompt_width
    drawn = domains.draw(job.settings, n, domain=part.domain, split=part.split, number=number)
    tokens_B2T, mask_B2T = (np.asarray(x)[:, :, P:] for x in (part.rows.tokens_BKL, part.rows.mask_BKL))
    items = [
        judgements.Item(
            prompt=judgements.Prompt([{"role": role, "content": text} for role, text in drawn[b].turns], part.domain),
            completions=[
                judgements.Completion(red_team.text_of(tokens_T[mask_T]))
                for tokens_T, mask_T in zip(tokens_B2T[b], mask_B2T[b])
            ],
            metadata={"pair": f"{number}-{part.name}-{b}"},
        )
        for b in range(n)
    ]
    words_BP, world = part.prompts.words_BP, job.task.world
    assert words_BP is not None and world is not None
    answers = (x.reshape(2 * n, -1) for x in (tokens_B2T, mask_B2T))
    utility = world_words.gold_utility(world.tables, np.repeat(words_BP, 2, axis=0), *answers)
    return Asked(part, items, np.asarray(getattr(utility, part.domain)).reshape(n, 2))


def with_preferences(part: comparison_sets.Part, preference_B: np.ndarray) -> tuple[types.Comparisons, np.ndarray]:
    """Returns the pairs of a part with soft labels, and the mask of the pairs that these are.

    The probability of the preferred answer is the target of the loss. Held-out pairs with probability one half are left
    out too, because no order of them is right.

    Args:
        part: The part.
        preference_B: Probability that the first answer is better; NaN for pairs to leave out.
    """
    kept_B = ~np.isnan(preference_B)
    if part.split == "validation":
        kept_B &= ~feedback.is_tie(preference_B)
    first_B = preference_B >= 0.5
    rows = comparison_sets.with_labels(part.rows, domains.Labelled(first_B, kept_B), domain=part.domain)
    target_B = np.where(first_B, preference_B, 1 - preference_B).astype(np.float32)
    return dataclasses.replace(rows, loss_inputs={"target": target_B[kept_B]}), kept_B  # type: ignore[arg-type]


def agreement(job: jobs.Job, stage: str, asked: Asked, preference_B: np.ndarray, who: str) -> dict[str, Any]:
    """Reports how often labels of held-out pairs agree with the gold utility; ties count as half.

    Args:
        job: The job of the run.
        stage: Name of the stage.
        asked: The held-out pairs.
        preference_B: Their labels.
        who: Whose labels they are, such as "the judge".

    Returns:
        The agreement with its 95 % interval, by domain; empty if no labelled pair differs in gold utility.
    """
    gap_B = asked.gold_B2[:, 0] - asked.gold_B2[:, 1]
    used_B = (gap_B != 0) & ~np.isnan(preference_B)
    if not used_B.any():
        return {}
    preference_B, first_B = preference_B[used_B], gap_B[used_B] > 0
    right_B = np.where(feedback.is_tie(preference_B), 0.5, (preference_B > 0.5) == first_B)
    found = diagnostics.clustered_mean(right_B, asked.part.prompts.asked_B[used_B].tolist(), rate=True)
    text = (
        f"{who} agree{'' if who == 'people' else 's'} with {found.mean:.1%} of {len(right_B)} held-out gold labels of "
        f"{'helpfulness' if asked.part.domain == 'helpful' else 'harmlessness'} "
        f"(95 % interval {found.lo:.1%} to {found.hi:.1%})"
    )
    job.progress.message(stage, text)
    if found.lo <= 0.5 and who == "the judge":
        job.note(stage, f"{text}, which may be no better than chance")
    return {asked.part.domain: list(found)}


@dataclasses.dataclass(frozen=True)
class People:
    """Labels of people, who judge the pairs in a comparison store."""

    folder: pathlib.Path
    """The run folder."""
    path: pathlib.Path
    """The store, whose set "round N" has the pairs. Other items of the set are ignored."""
    least: float
    """Least share of the pairs that must have a label."""

    def __call__(self, job: jobs.Job, stage: str, asked: list[Asked], temperature: float | None) -> Preferences:
        """Adds the pairs to the store, unless it has them, and reads their labels; raises Waiting if too few have one.

        The label is the mean of the labelers' votes, in which a tie is one half. A pair about which all are unsure
        counts as labelled, so that the run continues, and is left out.
        """
        del temperature
        number = stage.removeprefix("comparisons-")
        name = "static policy" if number == str(comparison_sets.STATIC_SET) else f"round {number}"
        items = [item for each in asked for item in itertools.compress(each.items, each.different_B)]
        # In random order, in which people judge them, so that a part of the set has all kinds of pairs.
        order = np.random.default_rng([job.settings.seed, 0xAB]).permutation(len(items))
        items = [items[i] for i in order]
        with store.Store(self.path) as opened, opened.transaction(write=True):
            ids = opened.add(items, set_name=name)
            found, latest = opened.preferences(name), opened.latest(name)
        rows, own = {id: n for n, id in enumerate(found.items)}, set(ids)
        found = found._replace(items=ids, votes_NM=found.votes_NM[[rows[id] for id in ids]])
        latest = [each for each in latest if each.item in own]
        labelled = len({each.item for each in latest})
        needed = math.ceil(self.least * len(ids) - 1e-9)  # 0.7 * 10 is more than 7
        if labelled < needed:
            share = "" if needed == len(ids) else f" (at least {needed} are needed)"
            path = shlex.quote(str(self.path))
            raise Waiting(
                f"{self.path}: {labelled} of {errors.counted(len(ids), 'pairs')} have a label{share}; add people, "
                "start the page on which they label, and then continue with\n"
                f"    python -m rlhf_jax.feedback assign {path} --labelers NAME\n"
                f'    python -m rlhf_jax.feedback serve {path} --set "{name}"\n'
                f"    python experiments/hh.py --resume {shlex.quote(str(self.folder))}"
            )
        labels = {item.metadata["pair"]: p for item, p in zip(items, found.share_N)}
        preference_B = [np.array([labels.get(item.metadata["pair"], np.nan) for item in each.items]) for each in asked]
        agreed: dict[str, Any] = {}
        for each, own_B in zip(asked, preference_B):
            if each.part.split == "validation":
                agreed |= agreement(job, stage, each, own_B, "people")
        together = labeler_agreement.pairwise_agreement(found.votes_NM)
        facts = {
            "agreement": agreed,
            "ties": int(feedback.is_tie(found.share_N).sum()),
            "unsure": labelled - int((~np.isnan(found.share_N)).sum()),
            "unlabelled": len(ids) - labelled,
            "labelers": len({each.labeler for each in latest}),
            "labeler_agreement": together.share.mean if together.count else None,
        }
        return Preferences(preference_B, facts)


class JudgeLabels:
    """Labels of a judge. Without one, a simulated judge compares harmlessness, and simulated labelers helpfulness."""

    def __init__(self, settings: HHSettings, judge: feedback.Judge, answers: pathlib.Path) -> None:
        """Stores the arguments.

        Args:
            settings: The settings of the run.
            judge: The judge.
            answers: File in the run folder in which its answers are saved.
        """
        self._settings, self._judge, self._answers, self._questions = settings, judge, answers, 0

    def __call__(self, job: jobs.Job, stage: str, asked: list[Asked], temperature: float | None) -> Preferences:
        """Returns the labels, those of held-out pairs first, whose agreement is reported before others are asked for.

        Raises:
            DataError: Requests failed.
            Waiting: --max-requests was reached.
        """
        facts: dict[str, Any] = {"agreement": {}, "position_bias": {}, "unclear": 0}
        found: dict[str, np.ndarray] = {}
        world = job.task.world
        assert world is not None
        if self._settings.judge is None:
            if temperature is None:  # the first part is helpfulness
                rate = job.settings.world.agreement
                temperature = domains.calibrated_temperature(world.pool, asked[0].part.features_B2F, agreement=rate)
            facts["labeler_temperature"] = temperature
        for each in sorted(asked, key=lambda each: each.part.split == "train"):
            part = each.part
            if temperature is not None and part.domain == "helpful":
                labels = domains.label(
                    jax.random.fold_in(part.key, 1),
                    world.pool,
                    part.features_B2F,
                    domain="helpful",
                    temperature=temperature,
                )
                found[part.name] = np.where(labels.kept_B, labels.first_is_better_B.astype(float), np.nan)
                continue
            found[part.name], judged = self._ask(job, stage, each)
            facts["unclear"] += judged.unclear
            if part.split == "validation":
                facts["agreement"] |= agreement(job, stage, each, found[part.name], "the judge")
            else:
                bias = judged.position_bias
                facts["position_bias"][part.domain] = bias if math.isfinite(bias) else None
        return Preferences([found[each.part.name] for each in asked], facts)

    def _ask(self, job: jobs.Job, stage: str, asked: Asked) -> tuple[np.ndarray, feedback.Labels]:
        """Returns the judge's preferences, NaN for equal answers and unclear labels, and how they were obtained."""
        settings, domain = self._settings, asked.part.domain
        different_B = asked.different_B
        pairs = [
            feedback.Pair(
                own_run.prompt_text([dialogues.Turn(each["role"], each["content"]) for each in item.prompt.messages]),
                *(each.text for each in item.completions),
            )
            for item in itertools.compress(asked.items, different_B)
        ]
        questions = [HELPFULNESS] * len(pairs)
        if domain == "harmless":
            numbers_N1 = feedback.sampled_principles(
                len(pairs), rounds=1, principles=settings.principles, seed=settings.seed + 1
            )
            questions = [feedback.HARMLESSNESS[i].question for i in numbers_N1[:, 0]]
        examples = few_shot.HELPFUL_COMPARISONS if domain == "helpful" else few_shot.COMPARISONS
        labels = feedback.label(
            pairs,
            self._judge,
            principle=questions,
            examples=examples if settings.few_shot and settings.judge is not None else (),
            clamp=settings.clamp,
            answers=self._answers,
            max_questions=None if settings.max_requests is None else settings.max_requests - self._questions,
            batch=16 * _BATCH,
        )
        self._questions += labels.asked
        missing = int(np.isnan(labels.preference_N).sum())
        if labels.errors:
            reasons = "; ".join(f"{n} x {name}" for name, n in labels.errors.items())
            raise errors.DataError(
                f"{stage}: the judge has not labelled {missing} of {errors.counted(len(pairs), 'pairs')} ({reasons}); "
                "--resume makes the missing requests"
            )
        if labels.waiting:
            raise Waiting(
                f"{stage}: --max-requests was reached, and {missing} of {errors.counted(len(pairs), 'pairs')} have no "
                f"label; continue with\n    python experiments/hh.py --resume {self._answers.parent}"
            )
        preference_B = np.full(len(different_B), np.nan)
        preference_B[different_B] = labels.preference_N
        return preference_B, labels


def load_judge(settings: HHSettings) -> Any:
    """Returns the model of a judge in a folder, or None; raises SettingError if the judge cannot be used."""
    if settings.online.labels != "judge" or settings.judge is None:
        return None
    if judge_settings.is_address(settings.judge):
        own_models.judge(settings, None, batch=_BATCH)  # raises an error if a package is missing
        return None
    model = own_models.with_dtype(settings, own_models.load(settings, settings.judge, "--judge"))
    own_models.judge(settings, model, batch=_BATCH)  # raises an error if the tokenizer has no tokens for A and B
    return model


def _simulated_judge(job: jobs.Job) -> feedback.Judge:
    assert job.task.world is not None
    default = constitution_settings.Judge()
    return harm_judge.SimulatedJudge(
        job.task.world.tables,
        strength=default.strength,
        overconfidence=default.overconfidence,
        position_bias=default.position_bias,
        seed=job.settings.seed,
    )


def make(settings: HHSettings, job: jobs.Job, folder: pathlib.Path, model: Any) -> Source | None:
    """Returns the source that --online.labels selects; None for simulated labelers."""
    match settings.online.labels:
        case "people":
            online = settings.online
            rounds, static = len(online.sets), online.static and len(online.sets) > 1
            more = f", and {rounds * online.pairs} for the static policy (--online.no-static trains none)"
            each = f"{online.pairs + 2 * online.held_out} pairs in each of {errors.counted(rounds, 'rounds')}"
            job.progress.message("labels", f"people label at most {each}{more if static else ''}")
            path = pathlib.Path(online.store or folder / STORE)
            if not path.exists() and any((folder / "checkpoints").glob("pairs-*")):
                raise errors.DataError(
                    f"--resume {folder}: {path} does not exist; restore it or start a new run with --out"
                )
            store.Store(path).close()  # so that a file that is no store is found before anything is trained
            return People(folder, path, online.least_labels)
        case "judge":
            judge = _simulated_judge(job) if settings.judge is None else own_models.judge(settings, model, batch=_BATCH)
            return JudgeLabels(settings, judge, folder / "labels.jsonl")
        case _:
            return None
