"""Tests of the ids that end an answer and of the pad id in saved directories."""

import json

import jax
import pytest

from rlhf_jax import lm

CFG = lm.LMConfig(vocab_size=50, n_layers=1, d_model=16, n_heads=2, d_mlp=16, max_length=32)


@pytest.fixture
def saved(tmp_path):
    lm.save(tmp_path / "m", CFG, lm.init(jax.random.key(0), CFG))
    return tmp_path / "m"


def write(folder, *, config="absent", generation="absent"):
    """Sets ``eos_token_id`` in the two files of a directory; "absent" leaves the field or the file out."""
    fields = json.loads((folder / "config.json").read_text())
    fields.pop("eos_token_id", None)
    (folder / "config.json").write_text(json.dumps(fields | ({} if config == "absent" else {"eos_token_id": config})))
    (folder / "generation_config.json").unlink(missing_ok=True)
    if generation != "absent":
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation, "pad_token_id": 7}))


@pytest.mark.parametrize(
    "config, generation, stop_ids",
    [
        ("absent", "absent", ()),
        (None, None, ()),
        (3, "absent", (3,)),
        ("absent", 0, (0,)),
        (9, [2, 0], (0, 2, 9)),
        ([4, 3], 3, (3, 4)),
        ([], [49], (49,)),
    ],
)
def test_both_files_tell_which_ids_end_an_answer(config, generation, stop_ids, saved):
    write(saved, config=config, generation=generation)
    assert lm.load_stop_ids(saved) == stop_ids


@pytest.mark.parametrize("wrong", [-1, 50, "3", 1.0, True, [3, None], [[3]], {"a": 3}])
@pytest.mark.parametrize("file", ["config", "generation"])
def test_an_id_that_cannot_end_an_answer_is_an_error(wrong, file, saved):
    write(saved, **{file: wrong})
    with pytest.raises(ValueError, match=r"config\.json: eos_token_id contains .*; it must be null, an id in \[0, 49"):
        lm.load_stop_ids(saved)
