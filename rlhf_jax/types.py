"""The axis legend and the pytrees that cross rooms.

Axis letters, used as name suffixes everywhere (``logits_BTV``):

====  ==========================================================
B     batch (sequences, or prompts where K is present)
K     completions of one prompt
P     prompt width; prompts are left-padded to it
T     response width; responses are right-padded to it
L     P + T, or the width of any token row
R     packed rows, where B counts what is packed into them
V     vocabulary
D     model width
N     layers, H query heads (or a reward model's scores), G key/value heads, C head width, F mlp width, S cache slots
====  ==========================================================

Masks are carried, never derived from ``token == pad_id``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import struct

Params = Any
"""A nested dict of arrays."""


class LMOutput(NamedTuple):
    """What a forward pass returns: final hidden states and the (possibly grown) cache."""

    hidden_BLD: jax.Array
    cache: Any = None


class ApplyFn(NamedTuple):
    """The whole of what losses and trainers know about a language model.

    ``forward(params, tokens_BL, *, mask_BL=None) -> LMOutput`` and
    ``logits(params, hidden_BLD) -> logits_BLV``, of any part of the columns. A column sees no later column, and none
    where the mask is False. A model for packed rows takes ``segments_BL`` too, which only they bring along.

    ``lm.apply_fn(cfg)`` builds it for this library's own model; a Linen or NNX module fits in with two lambdas.
    """

    forward: Callable[..., LMOutput]
    logits: Callable[[Params, jax.Array], jax.Array]


@struct.dataclass
class Rollout:
    """Prompts and what a policy answered. Prompts left-padded to P, responses right-padded to T."""

    tokens_BL: jax.Array
    """int32, prompt then response."""
    mask_BL: jax.Array
    """bool, True at real tokens of either part."""
    response_mask_BT: jax.Array
    """bool, a prefix of every row; the stop token is inside."""
    logprobs_BT: jax.Array
    """float32, the sampler's own log-probabilities; 0 off the mask."""
    lengths_B: jax.Array
    """int32, response tokens including the stop."""
    finish_B: jax.Array
    """int32: 0 ran out of room (length), 1 stopped (stop)."""
    values_BT: jax.Array | None = None
    """float32, where they were asked for: the policy's own scalar head before each token; 0 off the mask."""


@struct.dataclass
class Experience:
    """A scored rollout, ready for the PPO update; everything in it is fixed through the epochs."""

    tokens_BL: jax.Array
    mask_BL: jax.Array
    response_mask_BT: jax.Array
    logprobs_BT: jax.Array
    """The behaviour policy's log-probabilities, from the scoring function that the update uses too."""
    values_BT: Any
    """The critic's values before each response token, at rollout time; None where there is no critic."""
    advantages_BT: jax.Array
    returns_BT: Any
    """What the critic learns, in its own units; None where there is no critic."""
    weights_BT: jax.Array | None = None
    """Importance weights of the tokens, where the sampler's distribution was not the policy's."""
    reference_BT: Any = None
    """The reference's log-probabilities, for a KL loss."""


@struct.dataclass
class Comparisons:
    """Ranked completions: every completion of a prompt in one batch element (InstructGPT 3.5)."""

    tokens_BKL: jax.Array
    mask_BKL: jax.Array
    ranks_BK: jax.Array
    """1 is best; equal ranks are ties."""
    where_BK: jax.Array
    """bool, True where a completion exists."""
    domain_B: Any = None
    """int32, what the prompt's labels are about (0 helpfulness, 1 harmlessness, ...), where that matters."""
    loss_inputs: Any = None
    """What the loss is told of each prompt beside scores and ranks, by keyword: a dict of ``[B]`` arrays, such as
    ``{"margin": margin_B}`` or ``{"target": target_B}``."""


@struct.dataclass
class Places:
    """Where each of some sequences stands in packed rows; int32, any one shape, such as ``[N]`` or ``[B, K]``.

    A sequence that is in no row has segment 0; row and column then are 0 and mean nothing.
    """

    row: jax.Array
    segment: jax.Array
    """Its number within the row, from 1."""
    end: jax.Array
    """Column of its last token."""


@struct.dataclass
class PackedComparisons:
    """:class:`Comparisons` with all their completions packed into a few rows, one after the other."""

    tokens_RL: jax.Array
    segments_RL: jax.Array
    """int32, which of a row's completions each token belongs to, from 1; 0 at padding."""
    places_BK: Places
    """Where each completion went."""
    ranks_BK: jax.Array
    where_BK: jax.Array
    domain_B: Any = None
    loss_inputs: Any = None
    groups: int = struct.field(pytree_node=False, default=1)
    """Into how many parts, packed apart from each other, the batch divides: the step's micro-batches. Part i has
    prompts and rows i, i + groups, ...; ``places_BK.row`` counts the rows of the part."""


@struct.dataclass
class Preferences:
    """What DPO and its relatives learn from: pairs of answers to one prompt, or answers marked good or bad alone.

    In pairs K is 2 and the better answer comes first. Marked answers have ``good_BK``, and any K; 1 where every prompt
    has one answer. C is the number of columns that the step's log-probabilities have: L, or T for answers behind a
    prompt of one width.
    """

    tokens_BKL: jax.Array
    mask_BKL: Any
    """bool, real tokens; None where all are, which is faster."""
    answer_BKC: jax.Array
    """bool, the tokens of the answer, its stop token included."""
    reference_BK: Any = None
    """float32, the reference's log-probability of each answer, a sum over its tokens; None: the step computes it."""
    targets_B: Any = None
    """float32, in pairs: how likely the first one is the better one, of a judge who is not sure; None: 1."""
    good_BK: Any = None
    """bool, which answers were marked good; None in pairs."""
    mismatched: Any = None
    """The same prompts with answers to others (`train.dpo.mismatched`), for KTO's baseline."""
