"""How busy members were lately, from what their pulses tell: pure."""

from dataclasses import dataclass

from workers.types import GatewayStats, WorkerStats

_HALF_LIFE_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """How busy a member was lately: 0 for what does not apply to its role.

    `busy` is the share of time in which a worker computed, `waiting` the share of a gateway's step
    time in which it waited for experts, `queue_age_s` the longest wait of a call that was seen,
    `step_s` the mean time of a gateway's steps.
    """

    busy: float = 0.0
    waiting: float = 0.0
    queue_age_s: float = 0.0
    step_s: float = 0.0


class ShareWindow:
    """Turns one member's counters, which only rise, into shares of the time that passed."""

    def __init__(self, half_life_s: float = _HALF_LIFE_S) -> None:
        self._half_life_s = half_life_s
        self._seen_s: float | None = None
        self._compute_s = self._wait_s = self._step_s = 0.0
        self._steps = 0
        self.latest = Shares()

    def note(self, stats: object, now_s: float) -> None:
        """Take a member's latest word; anything but statistics is not looked at.

        Those of a gateway come from its first rank alone.
        """
        if not isinstance(stats, WorkerStats | GatewayStats):
            return
        before_s, self._seen_s = self._seen_s, now_s
        passed_s = now_s - before_s if before_s is not None else 0.0
        keep = 0.5 ** (passed_s / self._half_life_s)
        match stats:
            case WorkerStats():
                busy = _share(stats.compute_s - self._compute_s, passed_s)
                self._compute_s = stats.compute_s
                age_s = max(stats.queue_age_s, keep * self.latest.queue_age_s)
                if passed_s:
                    busy = keep * self.latest.busy + (1 - keep) * busy
                    self.latest = Shares(busy=busy, queue_age_s=age_s)
            case GatewayStats():
                step_s, num_steps = stats.step_s - self._step_s, stats.steps - self._steps
                if stats.running and not num_steps:
                    self._seen_s = before_s  # a step is under way
                    return
                waiting = _share(stats.dispatch_wait_s - self._wait_s, step_s)
                self._step_s, self._wait_s = stats.step_s, stats.dispatch_wait_s
                self._steps = stats.steps
                if passed_s:  # without sequences there is no load
                    mean_s = step_s / max(num_steps, 1)
                    self.latest = Shares(
                        waiting=keep * self.latest.waiting + (1 - keep) * waiting,
                        step_s=keep * self.latest.step_s + (1 - keep) * mean_s,
                    )


def _share(part_s: float, whole_s: float) -> float:
    return min(max(part_s / whole_s, 0.0), 1.0) if whole_s > 0 else 0.0
