"""Padded token rows of demonstrations and rankings."""

import numpy as np
import pytest

from rlhf_jax.data import errors, padding


def any_share():
    return errors.DropCount(max_dropped=1.0)


def test_demonstration_rows_have_the_documented_layout():
    counts = errors.DropCount()
    rows = padding.demonstration_rows(
        [[2, 7, 3], [3]], [[8, 9, 1], [5, 6, 7, 8, 1]], prompt_width=4, response_width=4, pad_id=0, counts=counts
    )
    np.testing.assert_array_equal(rows.tokens_BL, [[0, 2, 7, 3, 8, 9, 1, 0], [0, 0, 0, 3, 5, 6, 7, 8]])
    np.testing.assert_array_equal(rows.mask_BL, [[0, 1, 1, 1, 1, 1, 1, 0], [0, 0, 0, 1, 1, 1, 1, 1]])
    # The stop token (1) of the first answer has a loss; the second answer is truncated and has no stop token.
    np.testing.assert_array_equal(rows.loss_mask_BL, [[0, 0, 0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 1, 1, 1, 1]])
    assert rows.tokens_BL.dtype == np.int32
    assert rows.mask_BL.dtype == rows.loss_mask_BL.dtype == np.bool_
    assert counts.truncated == {"answer truncated": 1}


def test_masks_do_not_depend_on_the_pad_id():
    rows = padding.demonstration_rows(
        [[0, 3]], [[0, 1]], prompt_width=3, response_width=3, pad_id=0, counts=errors.DropCount()
    )
    np.testing.assert_array_equal(rows.mask_BL, [[0, 1, 1, 1, 1, 0]])


def test_pair_rows_have_the_documented_layout():
    counts = any_share()
    rows = padding.ranking_rows(
        [[2, 3]], [[[5, 1], [9, 9, 9, 1]]], [[1, 2]], prompt_width=3, response_width=3, pad_id=0, counts=counts
    )
    np.testing.assert_array_equal(rows.tokens_BKL, [[[0, 2, 3, 5, 1, 0], [0, 2, 3, 9, 9, 9]]])
    np.testing.assert_array_equal(rows.mask_BKL, [[[0, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1]]])
    np.testing.assert_array_equal(rows.ranks_BK, [[1, 2]])
    np.testing.assert_array_equal(rows.where_BK, [[True, True]])
    assert counts.truncated == {"answer truncated": 1}


def test_ranking_rows_keep_all_answers_of_a_prompt_together():
    rows = padding.ranking_rows(
        [[3], [2, 3]],
        [[[5, 1], [6, 1], [7, 1]], [[8, 1], [9, 1]]],
        [[2, 1, 2], [1, 2]],
        prompt_width=2,
        response_width=2,
        pad_id=0,
        counts=errors.DropCount(),
    )
    assert rows.tokens_BKL.shape == (2, 3, 4)
    np.testing.assert_array_equal(rows.tokens_BKL[0], [[0, 3, 5, 1], [0, 3, 6, 1], [0, 3, 7, 1]])
    np.testing.assert_array_equal(rows.ranks_BK, [[2, 1, 2], [1, 2, 0]])
    np.testing.assert_array_equal(rows.where_BK, [[True, True, True], [True, True, False]])
    assert not rows.mask_BKL[1, 2].any()


def test_inconsistent_rows_are_errors():
    widths = {"prompt_width": 2, "response_width": 2, "pad_id": 0, "counts": any_share()}
    with pytest.raises(errors.DataError, match="the numbers must be equal, but there are 2 prompts, 1 answers"):
        padding.demonstration_rows([[3], [3]], [[1]], **widths)
    with pytest.raises(errors.DataError, match="prompt 1 has 3 tokens; it must have between 1 and 2"):
        padding.demonstration_rows([[3], [4, 4, 3]], [[1], [1]], **widths)
    with pytest.raises(errors.DataError, match="prompt 0 has 0 tokens"):
        padding.pad_prompts([[]], width=2, pad_id=0)
    with pytest.raises(errors.DataError, match="answer 0 has no tokens"):
        padding.demonstration_rows([[3]], [[]], **widths)
    with pytest.raises(errors.DataError, match="prompt 0 has 1 answers"):
        padding.ranking_rows([[3]], [[[1]]], [[1]], **widths)
    with pytest.raises(errors.DataError, match=r"prompt 0 has 2 answers with ranks \[0, 1\]"):
        padding.ranking_rows([[3]], [[[1], [5, 1]]], [[0, 1]], **widths)


def test_empty_batches_have_the_right_shape():
    widths = {"prompt_width": 2, "response_width": 3, "pad_id": 0, "counts": errors.DropCount()}
    assert padding.demonstration_rows([], [], **widths).tokens_BL.shape == (0, 5)
    assert padding.ranking_rows([], [], [], **widths).tokens_BKL.shape == (0, 2, 5)
