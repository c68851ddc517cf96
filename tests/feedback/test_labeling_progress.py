"""Who has judged what, and which items are repeated."""

import pytest

from rlhf_jax.feedback import labeling_progress, store
from rlhf_jax.feedback.judgements import Completion, Item, Judgement, Prompt


def item(n, **others):
    ask = Prompt([{"role": "user", "content": f"{n}?"}])
    return Item(prompt=ask, completions=[Completion("a"), Completion("b")], metadata={"n": n}, **others)


def test_work_counts_judgements_and_open_assignments(tmp_path):
    with store.Store(tmp_path / "a.sqlite") as opened:
        for name in ("Ada", "Bo"):
            opened.add_labeler(name)
        first, second, third = opened.add(map(item, range(3)), set_name="a")
        other = opened.add([item(5)], set_name="b")
        opened.add([item(0, duplicate_of=first)], set_name="a")
        for n, (name, key) in enumerate(
            [("Ada", first), ("Ada", first), ("Ada", second), ("Bo", first), ("Bo", other[0])]
        ):
            opened.record(name, key, Judgement(strength=1), key=str(n))
        opened.assign("Ada", set_name="a", now=0.0, lease=10.0)
        opened.assign("Bo", set_name="a", now=0.0, lease=10.0)
        work = labeling_progress.by_labeler(opened, now=5.0)
        assert work == {("Ada", "a"): (2, 1), ("Bo", "a"): (1, 1), ("Bo", "b"): (1, 0)}
        assert labeling_progress.by_labeler(opened, now=11.0)["Ada", "a"] == (2, 0)
        opened.record("Ada", third, Judgement(strength=1), key="late")
        assert labeling_progress.by_labeler(opened, now=5.0)["Ada", "a"] == (3, 0)
        left = [labeling_progress.remaining(opened, "a", judgements_per_item=n) for n in (1, 2, 3)]
        assert left == [0, 2, 3]  # the first item has two labelers


def test_duplicates_are_a_share_of_the_items_that_grows_with_the_set(tmp_path):
    with store.Store(tmp_path / "a.sqlite") as opened:
        opened.add(map(item, range(40)), set_name="a")
        opened.add([item(99, expected=Judgement(tie=True))], set_name="a")

        def chosen(share, seed=0):
            return labeling_progress.duplicates(opened.items("a"), share=share, seed=seed)

        added = chosen(0.1)
        assert len(added) == 4 and added == chosen(0.1) != chosen(0.1, seed=1)
        assert [opened.item(each.duplicate_of or "").completions for each in added] == [
            each.completions for each in added
        ]
        assert len(chosen(1.0)) == 40 and not chosen(0.0)
        opened.add(added, set_name="a")
        assert not chosen(0.1) and len(chosen(0.2)) == 4
        assert not {each.duplicate_of for each in chosen(0.2)} & {each.duplicate_of for each in added}
        opened.add(map(item, range(40, 80)), set_name="a")
        assert len(chosen(0.1)) == 4
    with pytest.raises(store.StoreError, match=r"share of duplicates is 1\.5"):
        labeling_progress.duplicates({}, share=1.5)
