"""A language model that writes critiques and revisions."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from rlhf_jax import generation, lm, types
from rlhf_jax.feedback import asking
from rlhf_jax.feedback.revision import Text


class ModelWriter:
    """Writes texts with the parameters of a model.

    A text depends only on the model, the request, the number of the sample and the seed.
    """

    def __init__(
        self,
        params: types.Params,
        *,
        cfg: lm.LMConfig | types.ApplyFn,
        sampling: generation.Sampling,
        encode: Callable[[str], Sequence[int]],
        decode: Callable[[Sequence[int]], str],
        seed: int = 0,
        batch: int = 16,
        width_multiple: int = 64,
    ) -> None:
        """Stores the arguments.

        Args:
            params: Parameters of the model.
            cfg: The model.
            sampling: How texts are sampled.
            encode: Tokenises a request, in the chat format if the model has one.
            decode: Returns the text of sampled tokens, without their stop token.
            seed: Seed of the samples.
            batch: Number of texts that are sampled together.
            width_multiple: Requests are padded on the left to a multiple of this number of tokens, so that few programs
                are compiled.
        """
        self._params, self._encode, self._decode = params, encode, decode
        self._seed, self._batch, self._multiple, self._stops = seed, batch, width_multiple, set(sampling.stop_ids)

        def run(params: types.Params, rng_B: jax.Array, tokens_BP: jax.Array, mask_BP: jax.Array) -> types.Rollout:
            return generation.generate(params, rng_B, tokens_BP, mask_BP, cfg=cfg, sampling=sampling)

        self._run = jax.jit(run)

    def __call__(self, requests: Sequence[str], *, sample: int = 0) -> Iterator[tuple[int, Text]]:
        """Yields the texts, in the order of the length of the requests; other samples are independent of this one."""
        rows = [list(self._encode(text)) for text in requests]
        for width, some in asking.batches_of_width(list(map(len, rows)), batch=self._batch, multiple=self._multiple):
            tokens_BP, mask_BP = np.zeros((self._batch, width), np.int32), np.zeros((self._batch, width), bool)
            mask_BP[:, -1] = True
            for b, i in enumerate(some):
                tokens_BP[b, width - len(rows[i]) :], mask_BP[b, width - len(rows[i]) :] = rows[i], True
            seeds_B = [self._key(requests[i], sample) for i in some] + [0] * (self._batch - len(some))
            rng_B = jax.vmap(jax.random.key)(np.array(seeds_B, np.uint32))
            rollout = self._run(self._params, rng_B, tokens_BP, mask_BP)
            sampled_BT, lengths_B = np.asarray(rollout.tokens_BL)[:, width:], np.asarray(rollout.lengths_B)
            for b, i in enumerate(some):
                ids = sampled_BT[b, : lengths_B[b]].tolist()
                text = self._decode(ids[:-1] if ids and ids[-1] in self._stops else ids)
                yield i, Text(text, len(rows[i]) + len(ids))

    def _key(self, request: str, sample: int) -> int:
        return int.from_bytes(hashlib.sha256(f"{self._seed} {sample} {request}".encode()).digest()[:4], "big")
