"""The prefix cache against a naive model of what every block and every place holds."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.unit.harness_gateway import make_request
from workers.gateway.kv import BlockPool
from workers.gateway.operations import CopyKvBlock, LoadState, SaveState
from workers.gateway.prefix_cache import PrefixCache, PrefixOptions
from workers.gateway.prefix_digest import prefix_digest, prefix_digests
from workers.gateway.prefix_tree import PrefixTree
from workers.gateway.sequence import Sequence

BLOCK = 4
NUM_BLOCKS = 16


class CacheMachine(RuleBasedStateMachine):
    """Sequences begin, advance and end; `written` is what each block holds, by position."""

    @initialize(places=st.integers(1, 5), idle=st.sampled_from([None, 0, 3]))
    def set_up(self, places, idle):
        self.kv = BlockPool(NUM_BLOCKS)
        options = PrefixOptions(
            num_places=places, max_idle_blocks=idle, least_gain_tokens=3, first_boundary_tokens=8
        )
        self.operations = []
        self.cache = PrefixCache(
            options, self.kv, self.operations.append, block_tokens=BLOCK, bit_stable=False
        )
        self.options = options
        self.running = []
        self.written = {}  # block to its salt and the tokens up to each of its positions
        self.states = {}  # sequence to tokens
        self.places = {}  # place to salt and tokens
        self.used = {}  # block to when it was last used, directly or through one below it
        self.state_used = {}  # place to when
        self.time = 0

    def run_operations(self, sequence):
        for operation in self.operations:
            match operation:
                case LoadState():
                    salt, tokens = self.places[operation.place]
                    assert salt == sequence.request.cache_salt
                    self.states[sequence] = tokens
                    self.state_used[operation.place] = self.time
                case SaveState():
                    salt = sequence.request.cache_salt
                    self.places[operation.place] = (salt, self.states[sequence])
                    self.state_used[operation.place] = self.time
                case CopyKvBlock():
                    self.written[operation.target] = dict(self.written[operation.source])
        self.operations.clear()

    def touch(self, blocks):
        self.time += 1
        self.used.update(dict.fromkeys(blocks, self.time))

    @precondition(lambda self: len(self.running) < 4)
    @rule(
        words=st.lists(
            st.sampled_from([(1, 2, 3), (4,) * 5, (5,), (6, 7)]), min_size=1, max_size=5
        ),
        salt=st.sampled_from(["", "", "other"]),
    )
    def begin(self, words, salt):
        prompt = sum(words, ())
        sequence = Sequence(make_request(prompt=prompt, cache_salt=salt), 0, 0)
        found = self.cache.find(sequence)
        self.check_match(found, salt, list(prompt), len(prompt) - 1)
        lacking = self.cache.num_lacking_blocks(sequence, found)
        if lacking > self.kv.num_free + self.kv.num_idle:
            return
        self.touch(self.cache.tree.blocks(found.node) if found.node else [])
        sequence.state_block = 0
        self.states[sequence] = ()
        self.drop(lambda: self.cache.begin(sequence, found))
        self.run_operations(sequence)
        assert self.states[sequence] == prompt[: sequence.computed]
        self.running.append(sequence)

    @precondition(lambda self: self.running)
    @rule(number=st.integers(0, 9), num_tokens=st.integers(1, 9), decoded=st.booleans())
    def advance(self, number, num_tokens, decoded):
        sequence = self.running[number % len(self.running)]
        if sequence.pending == 1 and decoded and len(sequence.tokens) % BLOCK:
            sequence.tokens.append(8)
        end = sequence.computed + self.cache.cut(sequence, min(num_tokens, sequence.pending))
        for position in range(sequence.computed, end):
            block = sequence.kv_blocks[position // BLOCK]
            others = [s for s in self.running if s is not sequence and block in s.kv_blocks]
            assert not others, "a block that another one reads"
            before = (sequence.request.cache_salt, tuple(sequence.tokens[: position + 1]))
            self.written.setdefault(block, {})[position % BLOCK] = before
        sequence.computed = end
        self.states[sequence] = tuple(sequence.tokens[:end])
        self.time += 1
        self.keep(sequence, lambda: self.cache.advanced(sequence))

    @precondition(lambda self: self.running)
    @rule(number=st.integers(0, 9), num_tokens=st.integers(1, 9))
    def finish(self, number, num_tokens):
        sequence = self.running[number % len(self.running)]
        while sequence.pending > 1:
            self.advance(self.running.index(sequence), num_tokens, decoded=False)
        for _ in range(num_tokens):
            self.advance(self.running.index(sequence), 1, decoded=True)
        self.end(self.running.index(sequence))

    @precondition(lambda self: self.running)
    @rule(number=st.integers(0, 9))
    def end(self, number):
        sequence = self.running.pop(number % len(self.running))
        self.keep(sequence, lambda: self.cache.ended(sequence))
        self.kv.give_back(sequence.kv_blocks)
        self.drop(self.cache.trim)
        if self.options.max_idle_blocks is not None:
            assert self.kv.num_idle <= self.options.max_idle_blocks

    @rule(num_blocks=st.integers(0, NUM_BLOCKS))
    def make_room(self, num_blocks):
        self.drop(lambda: self.cache.make_room(num_blocks))
        assert self.kv.num_free >= num_blocks or self.kv.num_idle == 0

    def keep(self, sequence, act):
        """Let a sequence leave something; of states, the one used longest ago makes way."""
        before = self.kept_places()
        act()
        saved = [o.place for o in self.operations if isinstance(o, SaveState)]
        oldest = sorted(before, key=self.state_used.__getitem__)
        for place in saved:
            if place in before:
                assert place == oldest[0]
        self.touch(b for b in sequence.kv_blocks if b in self.kv._kept)
        self.run_operations(sequence)

    def drop(self, act):
        """Do what may drop blocks: none of them was used later than one that could have gone."""
        before = {b for b in self.kv._kept if not self.kv.is_held(b)}
        act()
        gone = before - self.kv._kept
        idle_still = {b for b in self.kv._kept & before if not self.kv.is_held(b)}
        if gone and idle_still:
            assert max(self.used[b] for b in gone) <= min(self.used[b] for b in idle_still)

    def kept_places(self):
        return {checkpoint.place for checkpoint in self.cache.tree.checkpoints()}

    def check_match(self, found, salt, tokens, limit):
        """Compare with a search through everything that is kept."""
        lengths, states = {0}, {0}
        for node in self.cache.tree._nodes:
            blocks = self.cache.tree.blocks(node)
            kept = [t for n in reversed(list(node.path())) for t in n.tokens]
            if node.salt != salt:
                continue
            for end in range(BLOCK, len(blocks) * BLOCK + 1, BLOCK):
                if len(kept) >= end and kept[:end] == tokens[:end]:
                    lengths.add(end)
            if node in self.cache.tree._checkpoints and kept == tokens[: len(kept)]:
                states |= {len(kept)} if len(kept) <= limit else set()
        assert (found.num_tokens, found.position) == (max(lengths), max(states))

    @invariant()
    def every_block_is_accounted_for(self):
        if not hasattr(self, "kv"):
            return
        held = Counter(b for s in self.running for b in s.kv_blocks)
        kept = [b for node in self.cache.tree._nodes for b in node.blocks]
        assert len(kept) == len(set(kept)) == self.kv.num_kept
        assert held == self.kv._holders
        assert self.kv.num_idle == len(set(kept) - held.keys())
        assert self.kv.num_free == NUM_BLOCKS - len(set(kept) | held.keys())
        assert len(set(self.kv._free)) == self.kv.num_free

    @invariant()
    def everything_kept_is_what_it_is_said_to_be(self):
        if not hasattr(self, "kv"):
            return
        tree = self.cache.tree
        for node in tree._nodes:
            tokens = tuple(t for n in reversed(list(node.path())) for t in n.tokens)
            for position in range(len(tokens)):
                block = tree.blocks(node)[position // BLOCK]
                content = self.written[block][position % BLOCK]
                assert content == (node.salt, tokens[: position + 1])
            checkpoint = tree._checkpoints.get(node)
            if checkpoint is not None:
                assert self.places[checkpoint.place] == (node.salt, tokens)
                assert checkpoint.num_tokens == len(tokens)
                assert checkpoint.digest == prefix_digest(node.salt, tokens)
        places = [checkpoint.place for checkpoint in tree.checkpoints()]
        assert len(places) == len(set(places)) == self.options.num_places - len(tree._places)
        assert all(root.children for root in tree._roots.values())


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(
    derandomize=True, max_examples=30, stateful_step_count=40, deadline=None
)


def test_a_long_edge_is_compared_and_split_in_whole_blocks():
    kv = BlockPool(80)
    tree = PrefixTree(kv, BLOCK, num_places=1)
    tokens = list(range(200))
    tree.insert("", tokens, kv.take(50))

    for shared in (3, 4, 99, 100, 101, 199):
        other = [*tokens[:shared], *[999] * 50]
        assert tree.match("", other, len(other)).num_tokens == shared // BLOCK * BLOCK
    node = tree.insert("", tokens[:100], kv.take(25))
    assert len(tree.blocks(node)) == 25
    assert kv.num_kept == 50
    assert tree.match("", tokens, 200).num_tokens == 200


@pytest.mark.parametrize("lengths", [[1], [3, 3, 7], [0, 10]])
def test_digests_of_rising_lengths_are_those_of_each_alone(lengths):
    tokens = [5, 2**31, *range(8)]

    assert list(prefix_digests("s", tokens, lengths)) == [
        (length, prefix_digest("s", tokens[:length])) for length in lengths
    ]
    assert prefix_digest("s", tokens) != prefix_digest("t", tokens)
