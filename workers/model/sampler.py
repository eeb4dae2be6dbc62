"""Choose the next token of each sequence from its logits.

Order of operations, as in vLLM: logit bias; repetition penalty (over prompt and completion);
frequency and presence penalty (over the completion); ending ids are masked until `min_tokens` are
out. Log-probabilities are taken from the logits so adjusted. Then temperature and filters (see
`draw`): min-p, relative to the likeliest token; top-k; top-p over what is left, renormalised.

A token depends on its own row and on (seed, sequence index, position), never on other rows: the
random number is a keyed hash of the three.

Shape legend: B rows, R rows of some kind, V vocabulary, N tokens seen.
"""

import hashlib
import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from workers.model.draw import draw, likeliest
from workers.types import Request, Sampling, TokenLogprob

SCORED_ROWS = 64  # of log-probabilities at a time: bounds the memory of a large vocabulary


@dataclass(frozen=True, slots=True)
class Choice:
    """A chosen token.

    The margins are infinite unless teacher forcing asked for them (see `sample`): `margin` is how
    far the row was from another outcome, in logits for a greedy row and in probability for a drawn
    one; `filter_margin` how far, in probability, from a filter passing other tokens.
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
        self._end_of_mask = len(prompt) + request.stopping.min_tokens
        self._ending_ids = torch.tensor(sorted(request.stopping.ending_ids), dtype=torch.int64)
        self._bias_ids = torch.tensor([i for i, _ in sampling.logit_bias], dtype=torch.int64)
        self._bias = torch.tensor([b for _, b in sampling.logit_bias], dtype=torch.float32)
        self._penalties: Penalties | None = None
        if sampling.repetition_penalty != 1.0:
            self._penalties = Penalties(sampling, prompt)
        elif sampling.presence_penalty or sampling.frequency_penalty:
            self._penalties = Penalties(sampling)
        for token_id in completion:
            self.append(token_id)

    @property
    def adjusts(self) -> bool:
        """Whether the next token's logits differ from the model's."""
        return self._penalties is not None or self._masks or len(self._bias_ids) > 0

    @property
    def _masks(self) -> bool:
        return self.position < self._end_of_mask and len(self._ending_ids) > 0

    def append(self, token_id: int) -> None:
        """Count one more completion token, after the step that chose it is committed."""
        self.position += 1
        if self._penalties is not None:
            self._penalties.count(token_id)

    def uniform(self) -> float:
        """Return the random number of the next token, in [0, 1)."""
        key = struct.pack("<Q", self.sampling.seed & 0xFFFF_FFFF_FFFF_FFFF)
        counter = struct.pack("<QQ", self.sequence_index, self.position)
        digest = hashlib.blake2b(counter, digest_size=8, key=key).digest()
        return float(int.from_bytes(digest, "little") >> 11) * 2.0**-53

    def adjust_(self, logits_V: Tensor) -> None:
        """Apply bias, penalties and the mask of ending ids to one row, in place."""
        device = logits_V.device
        if len(self._bias_ids) > 0:
            logits_V.index_add_(0, self._bias_ids.to(device), self._bias.to(device))
        if self._penalties is not None:
            self._penalties.apply_(logits_V)
        if self._masks:
            logits_V[self._ending_ids.to(device)] = -math.inf


class Penalties:
    """What the tokens of one sequence cost; kept up token by token, not counted anew.

    Tokens of the prompt are seen, for the repetition penalty, and cost nothing else.
    """

    def __init__(self, sampling: Sampling, prompt: Iterable[int] = ()) -> None:
        self._sampling = sampling
        ids = list(dict.fromkeys(prompt))
        self._place = {token_id: place for place, token_id in enumerate(ids)}
        self._counts = dict.fromkeys(ids, 0)
        self._ids = torch.tensor(ids, dtype=torch.int64)
        self._costs = torch.zeros(len(ids), dtype=torch.float32)

    def count(self, token_id: int) -> None:
        """Count one completion token."""
        place = self._place.setdefault(token_id, len(self._place))
        if place == len(self._ids):  # full: twice the room
            room = max(64, place)
            self._ids = torch.cat([self._ids, torch.zeros(room, dtype=torch.int64)])
            self._costs = torch.cat([self._costs, torch.zeros(room)])
        count = self._counts[token_id] = self._counts.get(token_id, 0) + 1
        self._ids[place] = token_id
        self._costs[place] = (
            self._sampling.frequency_penalty * count + self._sampling.presence_penalty
        )

    def apply_(self, logits_V: Tensor) -> None:
        """Penalise one row, in place."""
        ids_N = self._ids[: len(self._place)].to(logits_V.device)
        costs_N = self._costs[: len(self._place)].to(logits_V.device)
        penalty = self._sampling.repetition_penalty
        seen_N = logits_V[ids_N]
        if penalty != 1.0:
            seen_N = torch.where(seen_N > 0, seen_N / penalty, seen_N * penalty)
        logits_V[ids_N] = seen_N - costs_N


def sample(
    logits_BV: Tensor, states: Sequence[SamplerState], *, emitted: Sequence[int] | None = None
) -> list[Choice]:
    """Choose one token for each row; logits and states stay as they are.

    Args:
        logits_BV: float32 logits.
        states: The sequences of the rows.
        emitted: For teacher forcing, the token that each row had produced; computes the margins.
            The margin of a row that chooses another token now is how far it is from the emitted
            one, infinite if a filter does not pass that.

    Raises:
        ValueError: A row has a logit that is not a number, or none that is finite.
    """
    assert logits_BV.shape[0] == len(states)
    if any(state.adjusts for state in states):
        logits_BV = logits_BV.clone()
        for state, logits_V in zip(states, logits_BV, strict=True):
            if state.adjusts:
                state.adjust_(logits_V)
    largest_B1 = logits_BV.argmax(dim=-1, keepdim=True)  # first of equals; NaN counts as largest
    if not bool(logits_BV.gather(-1, largest_B1).isfinite().all()):
        raise ValueError("a row of logits has no largest finite value; the model computed nonsense")
    choices = [Choice(token_id) for token_id in largest_B1.flatten().tolist()]
    _draw_rows(logits_BV, states, emitted, choices)
    if emitted is not None:
        for row, state in enumerate(states):
            if state.sampling.temperature == 0.0:
                margin = _greedy_margin(logits_BV[row], choices[row].token_id, emitted[row])
                choices[row] = Choice(choices[row].token_id, margin=margin)
    _add_logprobs(logits_BV, states, choices)
    return choices


def score(logits_RV: Tensor, token_ids: Sequence[int], num_top: int) -> list[TokenLogprob]:
    """Return the log-probability of one given token a row, with `num_top` alternatives.

    For prompts the logits are the model's own: bias and penalties do not apply to them.
    """
    scores: list[TokenLogprob] = []
    for start in range(0, len(token_ids), SCORED_ROWS):
        part_RV = logits_RV[start : start + SCORED_ROWS]
        ids = token_ids[start : start + SCORED_ROWS]
        totals_R1 = part_RV.logsumexp(dim=-1, keepdim=True)
        index_R1 = torch.tensor(ids, dtype=torch.int64, device=part_RV.device)[:, None]
        logprobs = (part_RV.gather(-1, index_R1) - totals_R1).flatten().tolist()
        tops: list[tuple[tuple[int, float], ...]] = [()] * len(ids)
        if num_top:
            top_ids, top_logits = likeliest(part_RV, min(num_top, part_RV.shape[1]))
            top_logprobs = (top_logits - totals_R1.cpu().numpy()).tolist()
            pairs = zip(top_ids.tolist(), top_logprobs, strict=True)
            tops = [tuple(zip(*pair, strict=True)) for pair in pairs]
        scores.extend(TokenLogprob(*entry) for entry in zip(ids, logprobs, tops, strict=True))
    return scores


def _draw_rows(
    logits_BV: Tensor,
    states: Sequence[SamplerState],
    emitted: Sequence[int] | None,
    choices: list[Choice],
) -> None:
    """Replace the choices of the rows that are drawn."""
    rows = [row for row, state in enumerate(states) if state.sampling.temperature > 0.0]
    if not rows:
        return
    drawn = draw(
        logits_BV if len(rows) == len(states) else logits_BV[rows],
        [states[row].sampling for row in rows],
        [states[row].uniform() for row in rows],
        None if emitted is None else [emitted[row] for row in rows],
    )
    for row, one in zip(rows, drawn, strict=True):
        choices[row] = Choice(one.token_id, margin=one.margin, filter_margin=one.filter_margin)


def _greedy_margin(logits_V: Tensor, token_id: int, emitted: int) -> float:
    if emitted != token_id:
        return float(logits_V[token_id] - logits_V[emitted])
    first, second = logits_V.topk(2).values.tolist()
    return float(first - second)


def _add_logprobs(logits_BV: Tensor, states: Sequence[SamplerState], choices: list[Choice]) -> None:
    """Add the log-probabilities that are asked for, rows with as many alternatives together."""
    rows_by_top: dict[int, list[int]] = {}
    for row, state in enumerate(states):
        if state.num_logprobs is not None:
            rows_by_top.setdefault(state.num_logprobs, []).append(row)
    for num_top, rows in rows_by_top.items():
        scores = score(logits_BV[rows], [choices[row].token_id for row in rows], num_top)
        for row, logprob in zip(rows, scores, strict=True):
            choices[row] = replace(choices[row], logprob=logprob)
