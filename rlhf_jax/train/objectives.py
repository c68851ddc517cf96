"""What a step of `train.dpo` minimises: DPO and its relatives, each a few lines over `losses`.

An objective maps a scored batch and the step's numbers to ``(losses_B, rewards_BK)``. The rewards are what the method
takes an answer to be worth, the implicit reward of its derivation; accuracy and margin are read off them, and nothing
is trained on them. Some build on others::

    DPO, and cDPO with label_smoothing > 0      dpo
    DPO on soft labels                          soft(dpo)
    DPO with an SFT term                        with_sft(dpo)
    length-normalised DPO                       per_token(dpo)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax import masking
from rlhf_jax.losses import preference, supervised


class Scored(NamedTuple):
    """A batch of answers with their log-probabilities; in pairs K is 2 and the better one comes first."""

    policy_BK: jax.Array
    """float32, summed over the tokens of the answer, the stop token included."""
    reference_BK: Any
    """The same under the reference; None for methods without one."""
    lengths_BK: jax.Array
    """Tokens of each answer, at least 1."""
    good_BK: Any = None
    targets_B: Any = None
    """As in `types.Preferences`."""
    baseline: Any = None
    """KTO's, a scalar; None where the batch has no mismatched answers."""

    def log_ratios(self) -> jax.Array:
        """``[B, K]``: log(policy / reference). Raises ``ValueError`` where there is no reference."""
        return self.policy_BK - _present(self.reference_BK, "reference log-probabilities")

    def four(self) -> tuple[jax.Array, ...]:
        """What the losses of pairs take: policy and reference, of the better and the worse answer each.

        Raises ``ValueError`` as :meth:`two` does, and where there is no reference.
        """
        return (*self.two(), *_columns(_present(self.reference_BK, "reference log-probabilities")))

    def two(self) -> tuple[jax.Array, jax.Array]:
        """The policy's log-probabilities of the better and the worse answer.

        Raises ``ValueError`` for labels that a loss of pairs would not read: marks, and soft labels outside of `soft`.
        """
        if self.good_BK is not None:
            raise ValueError("the batch has good_BK, which only an objective for marked answers reads, such as kto")
        if self.targets_B is not None:
            raise ValueError("the batch has targets_B, which the objective reads only within objectives.soft(...)")
        return _columns(self.policy_BK)

    def means(self) -> Scored:
        """The same with log-probabilities averaged over the tokens of each answer."""
        reference_BK = None if self.reference_BK is None else self.reference_BK / self.lengths_BK
        return self._replace(policy_BK=self.policy_BK / self.lengths_BK, reference_BK=reference_BK)

    def swapped(self) -> Scored:
        """The same pairs with the labels the other way round."""
        flipped = {"policy_BK": self.policy_BK[:, ::-1], "lengths_BK": self.lengths_BK[:, ::-1]}
        reference_BK = None if self.reference_BK is None else self.reference_BK[:, ::-1]
        return self._replace(reference_BK=reference_BK, **flipped)


Objective = Callable[[Scored, Any], tuple[jax.Array, jax.Array]]
"""``(scored, hyper) -> (losses_B, rewards_BK)``"""


def dpo(scored: Scored, hyper: Any) -> tuple[jax.Array, jax.Array]:
    """DPO (Rafailov 2023) on sums; ``hyper.label_smoothing`` above 0 makes it the conservative form."""
    losses_B = preference.dpo(*scored.four(), beta=hyper.beta, label_smoothing=hyper.label_smoothing)
    return losses_B, hyper.beta * scored.log_ratios()


def robust_dpo(scored: Scored, hyper: Any) -> tuple[jax.Array, jax.Array]:
    """DPO made unbiased for labels of which a share ``hyper.label_smoothing`` is flipped (Chowdhury 2024)."""
    losses_B = preference.robust_dpo(*scored.four(), beta=hyper.beta, label_smoothing=hyper.label_smoothing)
    return losses_B, hyper.beta * scored.log_ratios()


def ipo(scored: Scored, hyper: Any) -> tuple[jax.Array, jax.Array]:
    """IPO (Azar 2023) on log-probabilities averaged over tokens, as its authors have it."""
    means = scored.means()
    return preference.ipo(*means.four(), beta=hyper.beta), hyper.beta * means.log_ratios()


def hinge(scored: Scored, hyper: Any) -> tuple[jax.Array, jax.Array]:
    """The SLiC loss on DPO's margin."""
    return preference.hinge(*scored.four(), beta=hyper.beta), hyper.beta * scored.log_ratios()


def kto(scored: Scored, hyper: Any) -> tuple[jax.Array, jax.Array]:
    """KTO (Ethayarajh 2024) of answers marked good or bad; rewards are those above the baseline.

    The mean over the K answers of a prompt. Needs ``good_BK`` and ``mismatched`` in the batch.
    """
    good_BK, baseline = _present(scored.good_BK, "good_BK"), _present(scored.baseline, "mismatched answers")
    losses_BK = preference.kto(
        scored.policy_BK,
        _present(scored.reference_BK, "reference log-probabilities"),
        good_BK,
        baseline,
        beta=hyper.beta,
        desirable_weight=hyper.desirable_weight,
        undesirable_weight=hyper.undesirable_weight,
    )
    return jnp.mean(losses_BK, axis=1), hyper.beta * (scored.log_ratios() - baseline)


def orpo(scored: Scored, hyper: Any) -> tuple[jax.Array, jax.Array]:
    """ORPO (Hong 2024) on means, without a reference; rewards are the means, with which the odds rise."""
    means = scored.means()
    return preference.orpo(*means.two(), weight=hyper.odds_weight), means.policy_BK


def simpo(scored: Scored, hyper: Any) -> tuple[jax.Array, jax.Array]:
    """SimPO (Meng 2024) on means, without a reference."""
    means = scored.means()
    return preference.simpo(*means.two(), beta=hyper.beta, margin=hyper.margin), hyper.beta * means.policy_BK


def with_sft(objective: Objective) -> Objective:
    """Adds ``hyper.sft_coef`` times the mean token loss of the better answer, which keeps it likely."""

    def both(scored: Scored, hyper: Any) -> tuple[jax.Array, jax.Array]:
        losses_B, rewards_BK = objective(scored, hyper)
        return losses_B + hyper.sft_coef * supervised.next_token(scored.means().two()[0]), rewards_BK

    return both


def per_token(objective: Objective) -> Objective:
    """The same with log-probabilities averaged over tokens in place of sums."""

    def averaged(scored: Scored, hyper: Any) -> tuple[jax.Array, jax.Array]:
        return objective(scored.means(), hyper)

    return averaged


def soft(objective: Objective) -> Objective:
    """Its expectation over labels that are right with probability ``targets_B`` (Bai 2022, Constitutional AI 4.1)."""

    def expected(scored: Scored, hyper: Any) -> tuple[jax.Array, jax.Array]:
        p_B, hard = masking.as_float32(_present(scored.targets_B, "targets_B")), scored._replace(targets_B=None)
        right_B, rewards_BK = objective(hard, hyper)
        wrong_B, _ = objective(hard.swapped(), hyper)
        return p_B * right_B + (1.0 - p_B) * wrong_B, rewards_BK

    return expected


def _present(x: Any, name: str) -> Any:
    if x is None:
        raise ValueError(f"the objective needs {name}, and the batch has none")
    return x


def _columns(x_BK: jax.Array) -> tuple[jax.Array, jax.Array]:
    if x_BK.shape[1] != 2:
        raise ValueError(f"pairs have two answers a prompt, and the batch has {x_BK.shape[1]}")
    return x_BK[:, 0], x_BK[:, 1]
