"""Objectives of the `train.dpo` step: DPO and related methods, each a few lines on top of `losses`.

An objective maps a scored batch and the hyperparameters to ``(losses_B, rewards_BK)``. The rewards are the implicit
rewards of the method. They are logged and used for the metrics accuracy and margin, but nothing is trained on them.
Functions such as `soft` turn one objective into another::

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
    """A batch of answers with their log-probabilities. For pairs, K is 2 and the better answer comes first."""

    policy_BK: jax.Array
    """float32 log-probabilities under the policy, summed over the tokens of the answer, including the stop token."""
    reference_BK: Any
    """float32 log-probabilities under the reference, also summed; None for methods without a reference."""
    lengths_BK: jax.Array
    """float32 number of tokens of each answer, at least 1."""
    good_BK: Any = None
    """bool, True for answers labelled good, as in `types.Preferences`; None for pairs."""
    targets_B: Any = None
    """float32, probability that the first answer is the better one, as in `types.Preferences`; None for 1."""
    baseline: Any = None
    """KTO's baseline, a scalar in nats; None if the batch has no mismatched answers."""

    def log_ratios(self) -> jax.Array:
        """Returns log(policy / reference), ``[B, K]``. Raises ``ValueError`` if there is no reference."""
        return self.policy_BK - _present(self.reference_BK, "reference log-probabilities")

    def pairs(self) -> tuple[jax.Array, ...]:
        """Returns the policy's log-probabilities of the better and worse answers, then the reference's, each ``[B]``.

        Raises ``ValueError`` if there is no reference, or for a batch that :meth:`policy_pair` rejects.
        """
        return (*self.policy_pair(), *_columns(_present(self.reference_BK, "reference log-probabilities")))

    def policy_pair(self) -> tuple[jax.Array, jax.Array]:
        """Returns the policy's log-probabilities of the better and of the worse answer, each ``[B]``.

        Raises ``ValueError`` if K is not 2, or if the batch has labels that a pairwise loss would ignore: good/bad
        labels, or soft labels if the objective is not wrapped in `soft`.
        """
        if self.good_BK is not None:
            raise ValueError("the batch has good_BK, which pairwise objectives ignore; use an objective such as kto")
        if self.targets_B is not None:
            raise ValueError("the batch has targets_B; wrap the objective in objectives.soft(...) to use them")
        return _columns(self.policy_BK)

    def means(self) -> Scored:
        """Returns the batch with log-probabilities averaged over the tokens of each answer."""
        reference_BK = None if self.reference_BK is None else self.reference_BK / self.lengths_BK
        return self._replace(policy_BK=self.policy_BK / self.lengths_BK, reference_BK=reference_BK)

    def swapped(self) -> Scored:
        """Returns the pairs with their two answers exchanged."""
        flipped = {"policy_BK": self.policy_BK[:, ::-1], "lengths_BK": self.lengths_BK[:, ::-1]}
        reference_BK = None if self.reference_BK is None else self.reference_BK[:, ::-1]
        return self._replace(reference_BK=reference_BK, **flipped)


Objective = Callable[[Scored, Any], tuple[jax.Array, jax.Array]]
"""``(scored, hyper) -> (losses_B, rewards_BK)``; ``hyper`` is a `train.dpo.Hyper`."""


def dpo(scored: Scored, hyper: Any) -> tuple[jax.Array, jax.Array]:
    """Computes the DPO loss ``-log sigmoid(beta h)`` (Rafailov 2023 Eq 7).

    Here h is ``log(policy / reference)`` of the better answer minus that of the worse. If ``hyper.label_smoothing``
    (eps) is above 0, the loss is cDPO's: ``-(1 - eps) log sigmoid(beta h) - eps log sigmoid(-beta h)``.

    Example:
        >>> import jax.numpy as jnp
        >>> from rlhf_jax.train import dpo, objectives
        >>> scored = objectives.Scored(jnp.array([[-4.0, -6.0]]), jnp.array([[-5.0, -5.0]]), jnp.ones((1, 2)))
        >>> losses_B, rewards_BK = objectives.dpo(scored, dpo.Hyper(beta=0.5))
        >>> print(round(float(losses_B[0]), 4), rewards_BK.tolist())
        0.3133 [[0.5, -0.5]]
    """
    losses_B = preference.dpo(*scored.pairs(), beta=hyper.beta, label_smoothing=hyper.label_smoothing)
    return losses_B, hyper.beta * scored.log_ratios()


def robust_dpo(scored: Scored, hyper: Any) -> tuple[jax.Array, jax.Array]:
    """Computes DPO's loss, corrected for a share ``hyper.label_smoothing`` of flipped labels (Chowdhury 2024)."""
    losses_B = preference.robust_dpo(*scored.pairs(), beta=hyper.beta, label_smoothing=hyper.label_smoothing)
    return losses_B, hyper.beta * scored.log_ratios()


def ipo(scored: Scored, hyper: Any) -> tuple[jax.Array, jax.Array]:
    """Computes the IPO loss ``(h - 1 / (2 beta))^2``, where h is as in `dpo` but averaged over tokens (Azar 2023)."""
    means = scored.means()
    return preference.ipo(*means.pairs(), beta=hyper.beta), hyper.beta * means.log_ratios()


def hinge(scored: Scored, hyper: Any) -> tuple[jax.Array, jax.Array]:
    """Computes the hinge loss ``max(0, 1 - beta h)``, where h is as in `dpo` (SLiC, Zhao 2023)."""
    return preference.hinge(*scored.pairs(), beta=hyper.beta), hyper.beta * scored.log_ratios()


def kto(scored: Scored, hyper: Any) -> tuple[jax.Array, jax.Array]:
    """Computes the KTO loss of answers labelled good or bad; rewards are relative to the baseline (Ethayarajh 2024).

    The loss is the mean over the K answers of a prompt. The batch needs ``good_BK`` and ``mismatched``.
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
    """Computes the ORPO loss, which needs no reference (Hong 2024); the rewards are mean log-probabilities."""
    means = scored.means()
    return preference.orpo(*means.policy_pair(), weight=hyper.odds_weight), means.policy_BK


def simpo(scored: Scored, hyper: Any) -> tuple[jax.Array, jax.Array]:
    """Computes the SimPO loss on mean log-probabilities, without a reference (Meng 2024)."""
    means = scored.means()
    return preference.simpo(*means.policy_pair(), beta=hyper.beta, margin=hyper.margin), hyper.beta * means.policy_BK


def with_sft(objective: Objective) -> Objective:
    """Adds ``sft_coef`` times the better answer's SFT loss (nats per token), which keeps that answer likely."""

    def with_sft_loss(scored: Scored, hyper: Any) -> tuple[jax.Array, jax.Array]:
        losses_B, rewards_BK = objective(scored, hyper)
        return losses_B + hyper.sft_coef * supervised.next_token(scored.means().policy_pair()[0]), rewards_BK

    return with_sft_loss


def per_token(objective: Objective) -> Objective:
    """Returns the objective, evaluated on log-probabilities averaged over tokens instead of summed."""

    def averaged(scored: Scored, hyper: Any) -> tuple[jax.Array, jax.Array]:
        return objective(scored.means(), hyper)

    return averaged


def soft(objective: Objective) -> Objective:
    """Returns the expectation of the objective if labels are correct with probability ``targets_B``.

    See Bai 2022 (Constitutional AI).
    """

    def expected(scored: Scored, hyper: Any) -> tuple[jax.Array, jax.Array]:
        p_B, hard = masking.as_float32(_present(scored.targets_B, "targets_B")), scored._replace(targets_B=None)
        right_B, rewards_BK = objective(hard, hyper)
        wrong_B, _ = objective(hard.swapped(), hyper)
        return p_B * right_B + (1.0 - p_B) * wrong_B, rewards_BK

    return expected


def _present(x: Any, name: str) -> Any:
    if x is None:
        raise ValueError(f"the objective needs {name}, which the batch does not have")
    return x


def _columns(x_BK: jax.Array) -> tuple[jax.Array, jax.Array]:
    if x_BK.shape[1] != 2:
        raise ValueError(f"a pairwise objective needs two answers per prompt; the batch has {x_BK.shape[1]}")
    return x_BK[:, 0], x_BK[:, 1]
