"""The decoder: embedding to logits for the rows of one step, on one rank of a gateway.

A rank carries the residual of its own rows only. Per layer: norm, all-gather, mixer over this
rank's heads, reduce-scatter, norm, gate, dispatch, shared expert during the round trip, combine.
With several micro-batches the experts of one compute while the mixer of the next does.

Shape legend: R padded rows, S own rows (padded), T own rows, D hidden, E experts, V vocabulary.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from workers.dispatch.base import Dispatcher, DispatchHandle
from workers.errors import PoisonError
from workers.mesh import TensorParallelGroup
from workers.model.attention import GatedAttention
from workers.model.batch import Segment, StepBatch
from workers.model.cache import SequenceCache, StagedStates
from workers.model.config import ModelConfig
from workers.model.delta_net import GatedDeltaNet
from workers.model.experts import swiglu
from workers.model.gate import GateProbe, TopKGate
from workers.model.kernels import Kernels
from workers.model.layers import ROW_TILE, Linear, RmsNorm, VocabularyEmbedding
from workers.model.parameters import (
    AttentionParameters,
    DecoderParameters,
    LayerParameters,
    MoeParameters,
)
from workers.model.rope import RotaryEmbedding
from workers.model.step import StepOptions, StepPlan, plan_step


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderOptions:
    """How a step is computed.

    With `bit_stable` a row's result does not depend on its company or on where its experts live;
    slower. `micro_batches` are the parts of a step that overlap: 2, or 1 where nothing overlaps.
    """

    bit_stable: bool = False
    micro_batches: int = 1


class Decoder:
    """All layers of one rank. Every rank of the group calls `forward` with the same batch."""

    def __init__(
        self,
        config: ModelConfig,
        parameters: DecoderParameters,
        group: TensorParallelGroup,
        dispatcher: Dispatcher,
        *,
        kernels: Kernels,
        options: DecoderOptions | None = None,
        probe: GateProbe | None = None,
    ) -> None:
        self._config = config
        self._group = group
        self._dispatcher = dispatcher
        self._kernels = kernels
        self._options = options or DecoderOptions()
        self._probe = probe
        self._device = parameters.embed.device
        self._dtype = parameters.embed.dtype
        row_tile = ROW_TILE if self._options.bit_stable else None
        self._rotary = RotaryEmbedding(config, self._device)
        self._embed = VocabularyEmbedding(
            parameters.embed, parameters.vocab_start, whole=group.size == 1
        )
        self._layers = _build_layers(config, parameters.layers, kernels, row_tile)
        self._norm = RmsNorm(parameters.norm, config.rms_norm_eps)
        self._head = Linear(parameters.head, row_tile=row_tile)

    @torch.inference_mode()
    def forward(self, batch: StepBatch, cache: SequenceCache) -> Tensor:
        """Compute one step; states are staged in the cache, the caller commits or discards them.

        Returns float32 logits [sum of num_logits, vocab_size] in the order of the segments. Raises
        PoisonError, on every rank, when the dispatcher of any rank has given up some rows.
        """
        if self._probe is not None:
            self._probe.begin(batch.num_rows)
        flows = [
            self._begin(segments, first_row, cache)
            for segments, first_row in _split(batch.segments, self._options.micro_batches)
        ]
        for layer in self._layers:
            for flow in flows:
                self._mix(layer, flow)
                self._dispatch(layer, flow)
        if not flows:
            return torch.empty(0, self._config.vocab_size, device=self._device)
        x_LD = torch.cat([self._finish(flow) for flow in flows])
        poisoned = [row for flow in flows for row in flow.poisoned]
        num_logits = x_LD.shape[0]
        if self._options.bit_stable:
            x_LD = functional.pad(x_LD, (0, 0, 0, -num_logits % ROW_TILE))
        # All ranks; ends by the group's deadline.
        logits_LV = self._group.gather_columns(self._head(self._norm(x_LD).to(self._dtype)))
        if poisoned:  # only now: all ranks have left their collectives
            raise PoisonError(_segments_of(poisoned, batch))
        return logits_LV[:num_logits, : self._config.vocab_size].float()

    def _begin(self, segments: Sequence[Segment], first_row: int, cache: SequenceCache) -> "_Flow":
        options = StepOptions(
            rank=self._group.rank,
            size=self._group.size,
            block_tokens=cache.block_tokens,
            bit_stable=self._options.bit_stable,
            device=self._device,
        )
        plan = plan_step(segments, self._rotary, options)
        staged = cache.stage(
            [s.state_block for s in plan.segments],
            [i for i, s in enumerate(plan.segments) if s.start == 0],
        )
        return _Flow(
            plan=plan,
            cache=cache,
            staged=staged,
            step=self._kernels.prepare(plan, cache),
            # All ranks; ends by the group's deadline.
            x_SD=self._group.reduce_scatter_rows(self._embed(plan.token_ids_R)),
            first_row=first_row,
            batch_rows=[first_row + row for row in plan.batch_rows_N[plan.own]],
        )

    def _mix(self, layer: "_Layer", flow: "_Flow") -> None:
        """Take in what the experts of the layer before answer, then run this layer's mixer."""
        self._combine(flow)
        h_SD = layer.input_norm(flow.x_SD).to(self._dtype)
        h_RD = self._group.all_gather_rows(h_SD)  # all ranks; ends by the group's deadline
        if isinstance(layer.mixer, GatedAttention):
            kv = flow.cache.kv(layer.kind_index)
            y_RD = layer.mixer.forward(h_RD, flow.plan, flow.step, kv)
        else:
            states = flow.staged.layer(layer.kind_index)
            y_RD = layer.mixer.forward(h_RD, flow.plan, flow.step, states)
        # All ranks; ends by the group's deadline.
        flow.x_SD = flow.x_SD + self._group.reduce_scatter_rows(y_RD)

    def _dispatch(self, layer: "_Layer", flow: "_Flow") -> None:
        """Send own rows to their experts; the shared expert computes during the round trip."""
        h_SD = layer.post_norm(flow.x_SD).to(self._dtype)
        logits_SE, gate_up, shared_gate = layer.moe.project(h_SD).split_with_sizes(
            layer.moe.sizes, -1
        )
        if flow.plan.num_own and not flow.given_up:  # else the step counts for nothing
            cut = flow.plan.cut_own
            expert_ids_SK, weights_SK = layer.moe.gate(logits_SE)
            if self._probe is not None:
                rows, chosen = flow.batch_rows, layer.moe.gate.num_chosen
                self._probe.record(layer.index, rows, cut(logits_SE), chosen)
            flow.handle = self._dispatcher.dispatch(
                layer.index, cut(h_SD), cut(expert_ids_SK), cut(weights_SK)
            )
        shared_SD = layer.moe.shared_down(swiglu(gate_up))
        flow.x_SD = torch.addcmul(flow.x_SD, shared_SD, shared_gate.sigmoid())

    def _combine(self, flow: "_Flow") -> None:
        if flow.handle is not None:
            flow.plan.cut_own(flow.x_SD).add_(self._dispatcher.combine(flow.handle))
            flow.given_up = tuple(flow.handle.given_up)
            flow.handle = None

    def _finish(self, flow: "_Flow") -> Tensor:
        """Return the residual of the rows whose logits are wanted, on every rank.

        Rows that were given up on one rank are marked for all to see: nothing else is minus
        infinity in every column.
        """
        self._combine(flow)
        for row in flow.given_up:
            flow.x_SD[row] = -torch.inf
        # All ranks; ends by the group's deadline.
        x_RD = flow.plan.cut(self._group.all_gather_rows(flow.x_SD))
        rows = torch.isneginf(x_RD.amax(-1)).nonzero().flatten().tolist()
        flow.poisoned = [flow.first_row + flow.plan.batch_rows_N[row] for row in rows]
        return x_RD.index_select(0, flow.plan.logit_rows)


class _Moe:
    """The gateway's part of a layer's experts: gate and shared expert, projected in one product."""

    def __init__(self, parameters: MoeParameters, num_chosen: int, row_tile: int | None) -> None:
        p = parameters
        self.project = Linear(p.gate, p.shared_gate_up, p.shared_gate, row_tile=row_tile)
        self.sizes = [p.gate.shape[0], p.shared_gate_up.shape[0], p.shared_gate.shape[0]]
        self.shared_down = Linear(p.shared_down, row_tile=row_tile)
        self.gate = TopKGate(num_chosen)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    """One decoder layer; `kind_index` counts the layers of its mixer's kind."""

    index: int
    kind_index: int
    input_norm: RmsNorm
    mixer: GatedAttention | GatedDeltaNet
    post_norm: RmsNorm
    moe: _Moe


@dataclass(slots=True, kw_only=True)
class _Flow:
    """One micro-batch on its way through the layers."""

    plan: StepPlan
    cache: SequenceCache
    staged: StagedStates
    step: Any
    x_SD: Tensor
    first_row: int
    batch_rows: list[int]
    handle: DispatchHandle | None = None
    given_up: tuple[int, ...] = ()  # of this rank's rows
    poisoned: list[int] = field(default_factory=list)  # rows of the batch, of all ranks


def _build_layers(
    config: ModelConfig,
    parameters: Sequence[LayerParameters],
    kernels: Kernels,
    row_tile: int | None,
) -> list[_Layer]:
    layers = []
    for index, p in enumerate(parameters):
        full = isinstance(p.mixer, AttentionParameters)
        mixer: GatedAttention | GatedDeltaNet = (
            GatedAttention(config, p.mixer, kernels, row_tile=row_tile)
            if isinstance(p.mixer, AttentionParameters)
            else GatedDeltaNet(config, p.mixer, kernels, row_tile=row_tile)
        )
        layers.append(
            _Layer(
                index=index,
                kind_index=sum(
                    isinstance(q.mixer, AttentionParameters) == full for q in parameters[:index]
                ),
                input_norm=RmsNorm(p.input_norm, config.rms_norm_eps),
                mixer=mixer,
                post_norm=RmsNorm(p.post_norm, config.rms_norm_eps),
                moe=_Moe(p.moe, config.num_experts_per_token, row_tile),
            )
        )
    return layers


def _segments_of(rows: Sequence[int], batch: StepBatch) -> tuple[int, ...]:
    """Return, in order, the segments of a batch to which its rows belong."""
    ends = list(accumulate(len(s.token_ids) for s in batch.segments))
    return tuple(sorted({bisect_right(ends, row) for row in rows}))


def _split(segments: Sequence[Segment], num_parts: int) -> list[tuple[Sequence[Segment], int]]:
    """Cut a batch by segments into at most `num_parts` parts of about equal rows.

    Returns each part with the batch row at which it begins; no part is empty.
    """
    total = sum(len(s.token_ids) for s in segments)
    parts: list[tuple[list[Segment], int]] = []
    row = 0
    for segment in segments:
        if not parts or row * num_parts >= len(parts) * total:
            parts.append(([], row))
        parts[-1][0].append(segment)
        row += len(segment.token_ids)
    return [(part, first) for part, first in parts]
