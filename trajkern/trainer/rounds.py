"""A step's questions: of the whole pool, or of what a system's filter has left of it for a round of steps."""

from __future__ import annotations

import torch

from trajkern.trainer.collect import play
from trajkern.trainer.run import Run
from trajkern.trainer.systems.base import GroupSystem
from trajkern.trainer.tasks import Question


def questions_of(run: Run) -> list[Question]:
    """This step's questions, all different. Where a round has fewer than a step's, others of the pool join them."""
    system, count = run.system, run.config.prompts
    if not system.rounds:
        return run.draw(run.pool, count)
    assert isinstance(system, GroupSystem)
    if (run.step - run.start.step) % system.rounds.steps == 0:
        begin_round(run, system, system.rounds.candidates)
    chosen = run.draw(system.round_prompts(), count)
    if len(chosen) < count:
        taken = set(chosen)
        chosen += run.draw([n for n in range(len(run.pool)) if n not in taken], count - len(chosen))
    return [run.pool[n] for n in chosen]


def begin_round(run: Run, system: GroupSystem, count: int) -> None:
    """Play ``count`` questions, and tell the system which of them its filter keeps."""
    numbers, scored = run.draw(range(len(run.pool)), count), system.scored
    with run.ranks.gathered(run.policy), run.clock.timing("sampling"):
        played, _, sampled = play(run, system, [run.pool[n] for n in numbers])
        kept = system.keeps(played)
    spent = run.ranks.sum(torch.tensor([sampled, system.scored - scored])).tolist()
    run.clock.sampled, run.clock.scored = run.clock.sampled + spent[0], run.clock.scored + spent[1]
    groups = kept.view(-1, run.config.rollouts)  # whole ones, in their order
    keep = torch.tensor(run.ranks.gather(groups.all(1).tolist()))
    if run.config.control == "random-drop":
        keep = keep[torch.randperm(count, generator=run.generator, device=run.generator.device)]
    system.next_round(numbers, keep)
