import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.gateway.kv import BlockPool, blocks_for
from workers.gateway.state import StateBlocks


@settings(derandomize=True, max_examples=50)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), max_size=60))
def test_every_block_is_free_or_taken_once(steps):
    pool = BlockPool(16)
    held = []
    for is_taking, amount in steps:
        if is_taking and amount <= pool.num_free:
            held.append(pool.take(amount))
        elif held:
            pool.give_back(held.pop(amount % len(held)))
        taken = [block for blocks in held for block in blocks]

        assert len(taken) == len(set(taken)) == pool.num_used
        assert set(taken) <= set(range(16))
        assert pool.num_free + pool.num_used == pool.num_blocks == 16


def test_a_block_freed_twice_is_an_error():
    pool = BlockPool(2)
    blocks = pool.take(1)
    pool.give_back(blocks)

    with pytest.raises(KeyError):
        pool.give_back(blocks)


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (16, 1), (17, 2), (32, 2)])
def test_blocks_cover_the_tokens(tokens, blocks):
    assert blocks_for(tokens, 16) == blocks


def test_state_blocks_are_counted():
    states = StateBlocks(2)
    first, second = states.take(), states.take()

    assert {first, second} == {0, 1}
    assert (states.num_free, states.num_used, states.num_blocks) == (0, 2, 2)
    states.give_back(first)
    assert states.take() == first
