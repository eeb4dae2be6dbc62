"""Choose the next token of each sequence from its logits.

Order of operations, as in vLLM: logit bias; repetition penalty (over prompt and completion);
frequency and presence penalty (over the completion); ending ids are masked until `min_tokens` are
out. Log-probabilities are taken from the logits so adjusted. Then temperature; min-p, relative to
the likeliest token; top-k; top-p over what is left, renormalised.

A token depends on its own row and on (seed, sequence index, position), never on other rows: the
random number is a keyed hash of the three, and inverts the cumulative distribution of the tokens
that pass the filters, in order of token id. (In this order a near-tie of two tokens does not change
which one a number selects; in order of probability it would.) Filters cut in order of probability,
ties by token id.

Shape legend: B rows, V vocabulary, N candidates.
"""

import hashlib
import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workers.types import Request, Sampling, TokenLogprob

NUM_CANDIDATES = 256  # looked at first where top-p or min-p have no top-k beside them
SCORED_ROWS = 64  # of prompt log-probabilities at a time: bounds the memory of a large vocabulary


@dataclass(frozen=True, slots=True)
class Choice:
    """A chosen token.

    The margins are infinite unless teacher forcing asked for them (see `sample`): `margin` is how
    far the row was from another outcome, in logits for a greedy row and in probability for a
    sampled one; `filter_margin` how far, in probability, from a filter passing other tokens.
    """

    token_id: int
    logprob: TokenLogprob | None = None
    margin: float = math.inf
    filter_margin: float = math.inf


class SamplerState:
    """What one sequence brings to its sampling: settings, and its tokens counted as they come.

    Args:
        request: Sampling and stopping settings, output, prompt.
        sequence_index: Which continuation of the prompt this is; part of the randomness.
        completion: Completion token ids that are there already (resumption).
    """

    def __init__(
        self, request: Request, sequence_index: int, completion: Iterable[int] = ()
    ) -> None:
        sampling, prompt = request.sampling, request.prompt_token_ids
        self.sampling = sampling
        self.num_logprobs = request.output.logprobs
        self.sequence_index = sequence_index
        self.position = len(prompt)  # of the token that is chosen next
        self._num_prompt = len(prompt)
        self._min_tokens = request.stopping.min_tokens
        self._ending_ids = torch.tensor(sorted(request.stopping.ending_ids), dtype=torch.int64)
        self._bias_ids = torch.tensor([i for i, _ in sampling.logit_bias], dtype=torch.int64)
        self._bias = torch.tensor([b for _, b in sampling.logit_bias], dtype=torch.float32)
        self._has_additive = bool(sampling.presence_penalty or sampling.frequency_penalty)
        self._counts = TokenCounts(prompt if sampling.repetition_penalty != 1.0 else ())
        for token_id in completion:
            self.append(token_id)

    @property
    def is_plain(self) -> bool:
        """Whether the next token is the largest logit and nothing else is asked."""
        return self.sampling.temperature == 0.0 and self.num_logprobs is None and not self.adjusts

    @property
    def adjusts(self) -> bool:
        """Whether the next token's logits differ from the model's."""
        return bool(
            self._bias_ids.numel()
            or self._has_penalty
            or (self._ending_ids.numel() and self.position - self._num_prompt < self._min_tokens)
        )

    @property
    def _has_penalty(self) -> bool:
        return self._has_additive or self.sampling.repetition_penalty != 1.0

    def append(self, token_id: int) -> None:
        """Count one more completion token, after the step that chose it is committed."""
        self.position += 1
        if self._has_penalty:
            self._counts.add(token_id)

    def uniform(self) -> float:
        """Return the random number of the next token, in [0, 1)."""
        key = struct.pack("<Q", self.sampling.seed & 0xFFFF_FFFF_FFFF_FFFF)
        counter = struct.pack("<QQ", self.sequence_index, self.position)
        digest = hashlib.blake2b(counter, digest_size=8, key=key).digest()
        return float(int.from_bytes(digest, "little") >> 11) * 2.0**-53

    def adjust_(self, logits_V: Tensor) -> None:
        """Apply bias, penalties and the mask of ending ids to one row, in place."""
        sampling, device = self.sampling, logits_V.device
        if self._bias_ids.numel():
            logits_V[self._bias_ids.to(device)] += self._bias.to(device)
        if self._has_penalty:
            ids_N, counts_N = (x.to(device) for x in self._counts.tensors())
            seen_N = logits_V[ids_N]
            penalty = sampling.repetition_penalty
            seen_N = torch.where(seen_N > 0, seen_N / penalty, seen_N * penalty)
            seen_N -= sampling.frequency_penalty * counts_N
            seen_N -= sampling.presence_penalty * (counts_N > 0)
            logits_V[ids_N] = seen_N
        if self.position - self._num_prompt < self._min_tokens:
            logits_V[self._ending_ids.to(device)] = -math.inf


class TokenCounts:
    """How often each seen token occurs in the completion; grows by one token at a time.

    Tokens of the prompt are seen with a count of 0.
    """

    def __init__(self, prompt: Iterable[int]) -> None:
        ids = list(dict.fromkeys(prompt))
        self._place = {token_id: place for place, token_id in enumerate(ids)}
        self._ids = torch.tensor(ids, dtype=torch.int64)
        self._counts = torch.zeros(len(ids), dtype=torch.float32)

    def add(self, token_id: int) -> None:
        """Count one completion token."""
        place = self._place.setdefault(token_id, len(self._place))
        if place == len(self._ids):  # full: twice the room
            room = max(64, place)
            self._ids = torch.cat([self._ids, torch.zeros(room, dtype=torch.int64)])
            self._counts = torch.cat([self._counts, torch.zeros(room)])
        self._ids[place] = token_id
        self._counts[place] += 1

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Return the distinct token ids, int64, and their counts, float32."""
        return self._ids[: len(self._place)], self._counts[: len(self._place)]


def sample(
    logits_BV: Tensor, states: Sequence[SamplerState], *, emitted: Sequence[int] | None = None
) -> list[Choice]:
    """Choose one token for each row; the states stay as they are.

    Args:
        logits_BV: float32 logits; not changed.
        states: The sequences of the rows.
        emitted: For teacher forcing, the token that each row had produced; computes the margins.
            The margin of a row that chooses another token now is how far it is from the emitted
            one, infinite if a filter does not pass that.

    Raises:
        ValueError: A row has a logit that is not a number, or none that is finite.
    """
    assert logits_BV.shape[0] == len(states)
    if emitted is None and all(state.is_plain for state in states):
        chosen = logits_BV.argmax(
            dim=-1, keepdim=True
        )  # the first of equals; NaN counts as largest
        _check_finite(logits_BV.gather(-1, chosen))
        return [Choice(token_id) for token_id in chosen.flatten().tolist()]
    choices = []
    for row, state in enumerate(states):
        logits_V = logits_BV[row]
        if state.adjusts:
            logits_V = logits_V.clone()
            state.adjust_(logits_V)
        _check_finite(logits_V.max())
        choices.append(_choose(logits_V, state, None if emitted is None else emitted[row]))
    return choices


def score(logits_RV: Tensor, token_ids: Sequence[int], num_top: int) -> list[TokenLogprob]:
    """Return the log-probability of one given token a row, from the model's own logits.

    Used for prompts, to which bias and penalties do not apply. `num_top` alternatives are added.
    """
    scores: list[TokenLogprob] = []
    for start in range(0, len(token_ids), SCORED_ROWS):
        rows = slice(start, start + SCORED_ROWS)
        totals = logits_RV[rows].logsumexp(dim=-1).tolist()
        scores.extend(
            _logprob(logits_V, total, token_id, num_top)
            for logits_V, total, token_id in zip(
                logits_RV[rows], totals, token_ids[rows], strict=True
            )
        )
    return scores


def _choose(logits_V: Tensor, state: SamplerState, emitted: int | None) -> Choice:
    if state.sampling.temperature == 0.0:
        choice = _choose_greedily(logits_V, emitted)
    else:
        choice = _draw(logits_V, state.sampling, state.uniform(), emitted)
    if state.num_logprobs is None:
        return choice
    total = float(logits_V.logsumexp(dim=-1))
    logprob = _logprob(logits_V, total, choice.token_id, state.num_logprobs)
    return Choice(choice.token_id, logprob, choice.margin, choice.filter_margin)


def _choose_greedily(logits_V: Tensor, emitted: int | None) -> Choice:
    token_id = int(logits_V.argmax())
    if emitted is None:
        return Choice(token_id)
    if emitted != token_id:
        return Choice(token_id, margin=float(logits_V[token_id] - logits_V[emitted]))
    first, second = logits_V.topk(2).values.tolist()
    return Choice(token_id, margin=first - second)


@dataclass(frozen=True, slots=True)
class _Kept:
    """The tokens that pass the filters, in order of token id, and how close the filters cut."""

    ids_N: NDArray[np.int64]
    weights_N: NDArray[np.float64]  # proportional to the probabilities
    margin: float


def _draw(logits_V: Tensor, sampling: Sampling, uniform: float, emitted: int | None) -> Choice:
    kept = _filter(logits_V, sampling)
    ends_N = kept.weights_N.cumsum()
    target = uniform * ends_N[-1]
    place = min(int(ends_N.searchsorted(target, side="right")), len(ends_N) - 1)
    token_id = int(kept.ids_N[place])
    if emitted is None:
        return Choice(token_id)
    edges = np.concatenate(([-math.inf], ends_N[:-1] / ends_N[-1], [math.inf]))
    if emitted == token_id:
        margin = min(uniform - edges[place], edges[place + 1] - uniform)
    elif (there := int(kept.ids_N.searchsorted(emitted))) < len(kept.ids_N) and (
        kept.ids_N[there] == emitted
    ):
        margin = max(edges[there] - uniform, uniform - edges[there + 1])
    else:
        margin = math.inf
    return Choice(token_id, margin=float(margin), filter_margin=kept.margin)


def _filter(logits_V: Tensor, sampling: Sampling) -> _Kept:
    """Return what passes min-p, top-k and top-p, looking at no more candidates than it takes."""
    vocab_size = logits_V.shape[0]
    top_k = min(sampling.top_k or vocab_size, vocab_size)
    if top_k == vocab_size and sampling.min_p == 0.0 and sampling.top_p >= 1.0:
        weights_V = _weights(logits_V, float(logits_V.max()), sampling.temperature)
        return _Kept(np.arange(vocab_size), weights_V, math.inf)
    num_candidates = min(vocab_size, top_k + 1 if top_k < vocab_size else NUM_CANDIDATES)
    kept = _cut(logits_V, sampling, top_k, num_candidates)
    if kept is None:
        kept = _cut(logits_V, sampling, top_k, vocab_size)
    assert kept is not None
    return kept


def _cut(logits_V: Tensor, sampling: Sampling, top_k: int, num_candidates: int) -> _Kept | None:
    """Filter the likeliest candidates; None when a filter might pass more than these."""
    vocab_size = logits_V.shape[0]
    ids_N, values_N = _likeliest(logits_V, num_candidates)
    weights_N = _weights(values_N, float(values_N[0]), sampling.temperature)  # the first is 1
    margin = math.inf
    count = len(ids_N)
    if sampling.min_p > 0.0:
        count = int((weights_N >= sampling.min_p).sum())
        margin = float(np.abs(weights_N - sampling.min_p).min())
    if top_k < count:
        margin = min(margin, float(weights_N[top_k - 1] - weights_N[top_k]))
        count = top_k
    whole = count == len(ids_N) < vocab_size  # nothing was cut: there may be more
    if whole and sampling.min_p > 0.0:
        return None
    if sampling.top_p < 1.0:
        total = (
            _weights(logits_V, float(values_N[0]), sampling.temperature).sum()
            if whole
            else weights_N[:count].sum()
        )
        before_N = np.concatenate(([0.0], weights_N[: count - 1].cumsum())) / total
        margin = min(margin, float(np.abs(before_N - sampling.top_p).min()))
        passing = max(1, int((before_N < sampling.top_p).sum()))
        whole = whole and passing == count
        count = passing
    if whole:
        return None
    order = ids_N[:count].argsort()
    return _Kept(ids_N[:count][order], weights_N[:count][order], margin)


def _likeliest(logits_V: Tensor, num_tokens: int) -> tuple[NDArray[np.int64], Tensor]:
    """Return the ids and logits of the largest logits, largest first, ties by token id."""
    if num_tokens < logits_V.shape[0]:
        least = logits_V.topk(num_tokens).values[-1]
        ids = (logits_V >= least).nonzero().flatten()  # with all that tie with the last one
    else:
        ids = torch.arange(logits_V.shape[0], device=logits_V.device)
    values, order = logits_V[ids].sort(descending=True, stable=True)
    return ids[order][:num_tokens].cpu().numpy(), values[:num_tokens]


def _weights(logits_N: Tensor, largest: float, temperature: float) -> NDArray[np.float64]:
    """Return the probabilities at a temperature, relative to that of the largest logit."""
    shifted_N = logits_N.cpu().numpy().astype(np.float64) - largest
    weights: NDArray[np.float64] = np.exp(shifted_N / temperature)
    return weights


def _logprob(logits_V: Tensor, total: float, token_id: int, num_top: int) -> TokenLogprob:
    top: tuple[tuple[int, float], ...] = ()
    if num_top:
        ids, values = _likeliest(logits_V, min(num_top, logits_V.shape[0]))
        top = tuple(
            (i, value - total) for i, value in zip(ids.tolist(), values.tolist(), strict=True)
        )
    return TokenLogprob(token_id, float(logits_V[token_id]) - total, top)


def _check_finite(largest: Tensor) -> None:
    if not bool(torch.isfinite(largest).all()):
        raise ValueError("a row of logits has no largest finite value; the model computed nonsense")
