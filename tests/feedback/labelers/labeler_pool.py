"""A comparison store with simulated labelers, some of whom have a bias."""

import numpy as np

from rlhf_jax.feedback import judgements, store
from rlhf_jax.feedback.judgements import Completion, Item, Judgement, Prompt

HONEST = ("Ada", "Bo", "Cy", "Di", "Em")
POLICIES = {"base": -1.0, "sft": 0.0, "ppo": 0.8}
"""Strengths of the policies, in nats."""


def item(i, texts, policies=(), **others):
    """Returns the i-th item, with completions of the texts."""
    prompt = Prompt([{"role": "user", "content": f"Question {i}?"}], ("helpful", "harmless")[i % 2], f"kind {i % 3}")
    written = zip(texts, policies or [""] * len(texts))
    return Item(prompt=prompt, completions=[Completion(*each) for each in written], **others)


def choose(rng, who, utilities, lengths, order):
    """Returns the ranks that a labeler gives to completions, of which ``order`` are shown."""
    if who == "random":
        utilities = np.zeros(len(order))
    if who == "long" and rng.random() < 0.8:
        return tuple(int(rank) for rank in 1 + np.argsort(np.argsort(-lengths)))
    if who == "first" and rng.random() < 0.6:
        return tuple(order.index(i) + 1 for i in range(len(order)))
    noisy = utilities + rng.gumbel(size=len(order))
    return tuple(int(rank) for rank in 1 + np.argsort(np.argsort(-noisy)))


def fill(
    path, *, seed=0, pairs=130, rankings=20, gold=20, duplicates=15, labelers=(*HONEST, "first", "long", "random")
):
    """Writes a store in which each labeler judges each item, and returns it open.

    The labelers "first", "long" and "random" prefer what is shown first, the longer completion, and anything.
    """
    rng, opened = np.random.default_rng(seed), store.Store(path)
    names = list(POLICIES)
    items, utilities = [], []
    for i in range(pairs + rankings + gold):
        count = 2 if i < pairs or i >= pairs + rankings else 3
        chosen = [names[k] for k in rng.permutation(3)[:count]]
        texts = [f"{name} {'word ' * rng.integers(1, 40)}" for name in chosen]
        spread = 4.0 if i >= pairs + rankings else 2.0
        utility = spread * (np.array([POLICIES[name] for name in chosen]) + rng.normal(size=count))
        expected = Judgement(strength=1 if utility[0] > utility[1] else 8) if i >= pairs + rankings else None
        items.append(item(i, texts, chosen, expected=expected))
        utilities.append(utility)
    with opened.transaction(write=True):
        ids = opened.add(items, set_name="a")
        again = [
            Item(prompt=each.prompt, completions=each.completions[::-1], duplicate_of=id)
            for each, id in zip(items[:duplicates], ids)
        ]
        ids += opened.add(again, set_name="a")
        known = dict(zip(ids, utilities + [each[::-1] for each in utilities[:duplicates]]))
        for who in labelers:
            opened.add_labeler(who)
            n = 0
            while (given := opened.assign(who, set_name="a", now=float(n))) is not None:
                lengths = np.array([len(each.text) for each in given.item.completions])
                ranks = choose(rng, who, known[given.id], lengths, given.order)
                seconds = round(float(rng.gamma(4.0, 5.0)), 1)
                if given.item.kind == judgements.RANKING:
                    answer = Judgement(ranks=ranks, seconds=seconds)
                elif rng.random() < 0.03:
                    answer = Judgement(tie=True, seconds=seconds)
                else:
                    answer = Judgement(strength=1 if ranks[0] < ranks[1] else 8, seconds=seconds)
                opened.record(who, given.id, answer, key=str(n), now=float(n))
                n += 1
    return opened
