"""Steps that trained nothing, and why that is likely."""

from __future__ import annotations

from collections.abc import Mapping

PATIENCE = 10  # steps in a row that train nothing before it is said


class Idle:
    """Watches for steps without a live group: a run may spend its hours on them and end as it began."""

    def __init__(self) -> None:
        self.steps = 0  # in a row
        self._trained = False
        self._rewards = 0.0
        self._last: Mapping[str, float | int | None] = {}

    def after(self, values: Mapping[str, float | int | None]) -> str | None:
        """What is to be said after a policy step with these metrics: after every :data:`PATIENCE` steps in a row that
        trained nothing, how many and the likely reason; else None."""
        if values.get("live_groups") and "grad_norm" in values:
            self.steps, self._rewards, self._trained = 0, 0.0, True
            return None
        self.steps, self._last = self.steps + 1, values
        self._rewards += values.get("reward") or 0.0
        return self._told() if self.steps % PATIENCE == 0 else None

    def ended(self) -> str | None:
        """What is to be said at the end of a stage in which no step trained anything, unless it just was."""
        return self._told() if self.steps % PATIENCE and not self._trained else None

    def _told(self) -> str:
        values = self._last
        if values.get("live_groups"):
            why = "what is kept of the live groups has no token to learn from: see the gates of the credit"
        elif values.get("gated_rollouts"):
            why = "its gate may leave no group two rollouts to compare: see compose.rubric and compose.gate"
        elif self._rewards <= 0:
            why = "no rollout earned a reward: a longer warm-up, an easier task or a larger max_new may help"
        else:
            why = "the rollouts of each question earned the same: more of them or a higher temperature may help"
        return f"nothing was trained in the last {self.steps} steps; {why}"
