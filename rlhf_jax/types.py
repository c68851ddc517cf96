"""Axis letters in array names, and pytrees that several subpackages share.

The name of an array ends in the letters of its axes, as in ``logits_BTV``:

====  ==========================================================
B     batch (sequences, or prompts if there is a K axis)
K     completions of one prompt
P     prompt width; prompts are left-padded to it
T     response width; responses are right-padded to it
L     P + T, or the width of any row of tokens
R     packed rows; B then counts the items packed into them
V     vocabulary
D     model width
N     layers
H     query heads, or output heads of a reward model
G     key/value heads
C     head width, or answer columns of `Preferences`
F     MLP width
S     cache slots
====  ==========================================================

Masks are passed explicitly and never derived from ``token == pad_id``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import struct

Params = Any
"""A nested dict of arrays."""


class LMOutput(NamedTuple):
    """The result of a forward pass: final hidden states and the updated cache."""

    hidden_BLD: jax.Array
    cache: Any = None


class ApplyFn(NamedTuple):
    """The two functions through which losses and trainers use a language model.

    Their signatures are ``forward(params, tokens_BL, *, mask_BL=None) -> LMOutput`` and
    ``logits(params, hidden_BLD) -> logits_BLV``; ``logits`` may be called on any subset of the columns. The model must
    be causal and must ignore the columns in which the mask is False. To train on packed rows, ``forward`` must also
    accept ``segments_BL``, which is passed for packed rows only.

    ``lm.apply_fn(cfg)`` returns the functions of this library's model; for a Linen or NNX module, write two lambdas.
    """

    forward: Callable[..., LMOutput]
    logits: Callable[[Params, jax.Array], jax.Array]


@struct.dataclass
class TokenBatch:
    """Rows of tokens, with masks of the real tokens and of the tokens to train on, as JAX or NumPy arrays."""

    tokens_BL: Any
    """int32 token ids."""
    mask_BL: Any
    """bool, True at real tokens."""
    loss_mask_BL: Any
    """bool, True at the tokens that contribute to the loss."""
    segments_BL: Any = None
    """int32, number of the sequence to which each token of a packed row belongs (`data.packing`); None without packing.
    The first token of a sequence has no context; its log-probability is 0, regardless of the loss mask."""


@struct.dataclass
class DistillationBatch(TokenBatch):
    """Rows of tokens, with a teacher's K most likely tokens at each position, as `lm.token_top_k` returns them."""

    ids_BLK: Any = None
    """int32, token ids."""
    logprobs_BLK: Any = None
    """float32, the teacher's log-probabilities of these tokens."""


@struct.dataclass
class Rollout:
    """Prompts and the responses that a policy sampled. Prompts are left-padded to P, responses right-padded to T."""

    tokens_BL: jax.Array
    """int32, the prompt followed by the response."""
    mask_BL: jax.Array
    """bool, True at the real tokens of prompt and response."""
    response_mask_BT: jax.Array
    """bool, True at the response tokens, including the stop token; in every row, the True entries come first."""
    logprobs_BT: jax.Array
    """float32, log-probabilities under the sampling distribution; 0 outside the mask."""
    lengths_B: jax.Array
    """int32, number of response tokens, including the stop token."""
    finish_B: jax.Array
    """int32: 0 if the response reached the maximum length, 1 if it ended with a stop token."""
    values_BT: jax.Array | None = None
    """float32, outputs of the policy's scalar head before each token, if requested; 0 outside the mask."""


@struct.dataclass
class Experience:
    """A scored rollout, ready for the PPO update. Its arrays stay fixed during all epochs."""

    tokens_BL: jax.Array
    mask_BL: jax.Array
    response_mask_BT: jax.Array
    logprobs_BT: jax.Array
    """Log-probabilities under the behaviour policy, computed by `ppo.Models.logprobs`, which the update also uses."""
    values_BT: Any
    """The critic's values before each response token, at rollout time; None without a critic."""
    advantages_BT: jax.Array
    returns_BT: Any
    """Regression targets of the critic, normalised if the step has ``normalise_values``; None without a critic."""
    weights_BT: jax.Array | None = None
    """Importance weights of the tokens if the train step has ``correct_sampler``; else None."""
    reference_BT: Any = None
    """Log-probabilities under the reference; needed only for a KL loss."""


@struct.dataclass
class Comparisons:
    """Ranked completions, with all completions of a prompt in one batch element (InstructGPT, section 3.5)."""

    tokens_BKL: jax.Array
    mask_BKL: jax.Array
    ranks_BK: jax.Array
    """int, ranks of the completions; 1 is best, and equal ranks are ties."""
    where_BK: jax.Array
    """bool, True where a completion exists."""
    domain_B: Any = None
    """int32, the criterion of each prompt's labels (0 helpfulness, 1 harmlessness, ...); None if there is only one."""
    loss_inputs: Any = None
    """Additional keyword arguments of the loss, with one value per prompt: a dict of ``[B]`` arrays, such as
    ``{"margin": margin_B}`` or ``{"target": target_B}``."""


@struct.dataclass
class Places:
    """Locations of sequences in packed rows: int32 arrays of the same shape, such as ``[B]`` or ``[B, K]``.

    A sequence that was not packed has segment 0; its ``row`` and ``end`` are 0 and have no meaning.
    """

    row: jax.Array
    segment: jax.Array
    """Number of the sequence within its row, counted from 1."""
    end: jax.Array
    """Column of the sequence's last token."""


@struct.dataclass
class PackedComparisons:
    """:class:`Comparisons` whose completions are concatenated into a few rows."""

    tokens_RL: jax.Array
    segments_RL: jax.Array
    """int32, number of the completion to which each token belongs, counted from 1 in each row; 0 at padding."""
    places_BK: Places
    """Location of each completion."""
    ranks_BK: jax.Array
    where_BK: jax.Array
    domain_B: Any = None
    loss_inputs: Any = None
    groups: int = struct.field(pytree_node=False, default=1)
    """Number of separately packed parts of the batch, one per micro-batch of the step. Part i consists of the prompts
    and rows i, i + groups, ...; ``places_BK.row`` counts rows within the part."""


@struct.dataclass
class Preferences:
    """A batch for DPO and related methods: pairs of responses to a prompt, or responses labelled good or bad.

    For pairs, K is 2 and the preferred response comes first. For labelled responses, ``good_BK`` is set and K is the
    number of responses per prompt, which may be 1. C is the number of columns for which the step computes
    log-probabilities: L, or T if all prompts have the same width.
    """

    tokens_BKL: jax.Array
    mask_BKL: Any
    """bool, True at real tokens; None if all are real, which is faster."""
    answer_BKC: jax.Array
    """bool, True at the tokens of the response, including the stop token."""
    reference_BK: Any = None
    """float32, the reference's log-probability of each response, summed over its tokens; if None, the step computes
    it."""
    targets_B: Any = None
    """float32, for pairs: the probability, according to a judge, that the first response is better; None means 1."""
    good_BK: Any = None
    """bool, True for responses labelled good; None for pairs."""
    mismatched: Any = None
    """The same prompts paired with responses to other prompts (`train.dpo.mismatched`), for KTO's baseline."""


@struct.dataclass
class PackedPreferences:
    """:class:`Preferences` whose responses, each with its prompt, are concatenated into a few rows."""

    tokens_RL: jax.Array
    segments_RL: jax.Array
    """int32, number of the response to which each token belongs, counted from 1 in each row; 0 at padding."""
    answer_RL: jax.Array
    """bool, True at the tokens of the responses, including the stop tokens."""
    places_BK: Places
    """Location of each response."""
    reference_BK: Any = None
    targets_B: Any = None
    good_BK: Any = None
    mismatched: Any = None
    """`PackedPreferences` in rows of their own."""
    groups: int = struct.field(pytree_node=False, default=1)
    """As in `PackedComparisons`."""
