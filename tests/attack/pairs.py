"""Several odd arguments at once, drawn by a seed from what a function may take, by the rule of ``odd``."""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterator
from functools import partial

from tests.attack.case import Case
from tests.attack.functions import good
from tests.attack.odd import agreed
from tests.attack.odd_values import mild

COUNT = 20_000


def cases(seed: int = 0) -> Iterator[Case]:
    draw, table = random.Random(seed), []
    for function, arguments in good().items():
        parameters = inspect.signature(function).parameters
        choices = {k: [*mild(str(x.annotation), arguments.get(k, x.default))] for k, x in parameters.items()}
        if sum(map(bool, choices.values())) > 1:
            table.append((function, arguments, tuple(parameters), {k: x for k, x in choices.items() if x}))
    for _ in range(COUNT):
        function, arguments, names, choices = draw.choice(table)
        chosen = {
            k: draw.choice(choices[k]) for k in draw.sample([*choices], min(len(choices), draw.choice((2, 3, 4))))
        }
        label = ", ".join(f"{k}: {shown}" for k, (shown, _) in chosen.items())
        call = partial(agreed, function, {**arguments, **{k: x for k, (_, x) in chosen.items()}})
        yield Case(function.__qualname__, label, call, names, may_pass=True)
