"""The layout of a step."""

from dataclasses import replace

import pytest

from tests.unit.harness_step import BLOCK_TOKENS, OPTIONS, plan, segment


def test_decoded_rows_come_first_and_longest_first() -> None:
    laid_out = plan([segment(0, 0, 3), segment(1, 5, 1), segment(2, 9, 1), segment(3, 4, 2)])

    assert laid_out.num_decode == 2
    assert [s.state_block for s in laid_out.segments] == [2, 1, 3, 0]
    assert laid_out.token_ids_R.tolist() == [9, 5, 4, 5, 0, 1, 2]
    assert laid_out.batch_rows_N == (4, 3, 5, 6, 0, 1, 2)


def test_logit_rows_are_in_the_order_of_the_batch() -> None:
    laid_out = plan([segment(0, 0, 3, 2), segment(1, 5, 1), segment(2, 9, 1, 0)])

    rows = [laid_out.batch_rows_N[row] for row in laid_out.logit_rows.tolist()]

    assert rows == [1, 2, 3]


def test_a_first_token_alone_is_a_chunk() -> None:
    laid_out = plan([segment(0, 0, 1)])

    assert laid_out.num_decode == 0
    assert [c.rows for c in laid_out.chunks] == [slice(0, 1)]


def test_keys_go_to_the_slots_of_their_positions() -> None:
    one = segment(1, 6, 3)

    slots = plan([one]).kv_slots_N.tolist()

    assert slots == [
        one.kv_blocks[p // BLOCK_TOKENS] * BLOCK_TOKENS + p % BLOCK_TOKENS for p in (6, 7, 8)
    ]


@pytest.mark.parametrize("rank", range(4))
def test_ranks_own_equal_shares_of_padded_rows(rank: int) -> None:
    laid_out = plan([segment(0, 0, 5)], replace(OPTIONS, rank=rank, size=4))

    assert laid_out.num_padded == 8
    assert laid_out.own == slice(2 * rank, 2 * rank + 2)
    assert laid_out.num_own == [2, 2, 1, 0][rank]


def test_bit_stable_rows_are_decoded_one_by_one() -> None:
    stable = replace(OPTIONS, bit_stable=True)

    assert plan([segment(0, 5, 1), segment(1, 3, 1)], stable).decode_groups == (
        slice(0, 1),
        slice(1, 2),
    )
