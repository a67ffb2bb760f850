"""Composing credit: which tokens of four rollouts are praised and blamed, as an expression grows part by part.

An agent is asked what three teas cost, may look a price up, and answers. Two rollouts are right, one of which gives a
secret away; of the wrong ones one looks up well and then miscounts, the other misspells its call. No model is needed:
``python examples/compose_credit.py`` prints each expression, the advantage of every token that the agent wrote (``.``:
it does not learn), and last the loss that they make.
"""

from __future__ import annotations

import torch

import trajkern as tk
from trajkern import credit

PROMPT = "3 teas cost ?"
ROLLOUTS = (  # what the agent wrote, with its calls in <> and what a tool said in []; its reward; its call's reward
    ("<price tea> [4] so 12", 1.0, 1.0),
    ("SECRET says 12", 1.0, None),
    ("<price tea> [4] so 11", 0.0, 1.0),
    ("<prize tea> [none] so 9", 0.0, 0.0),
)
HINT = {"11": -4.0, "9": -4.0, "<prize": -3.0, "<price": -0.5}  # log p of these words, had the answer been known
ELSE = -1.0  # of any other word, with the hint and without


def rollouts() -> tuple[credit.Rollouts, list[str]]:
    """The four as a packed batch with what is known of them, and the word of each token."""
    words, written, begin, calls = [], [], [0], []
    for number, (text, _, reward) in enumerate(ROLLOUTS):
        said, tool, first = PROMPT.split(), False, len(words) + len(PROMPT.split())
        words += said
        written += [False] * len(said)
        for word in text.split():
            tool = word.startswith("[")
            words.append(word)
            written.append(not tool)
        if reward is not None:
            calls.append((first, first + 2, number, reward))
        begin.append(len(words))
    start, end, trajectory, rewards = zip(*calls, strict=True)
    batch = tk.PackedBatch(
        tokens=torch.tensor([sorted(set(words)).index(word) for word in words]),
        cu_seqlens=torch.tensor(begin),
        loss_mask=torch.tensor(written),
        group_ids=torch.zeros(len(ROLLOUTS), dtype=torch.int64),
        rewards=torch.tensor([reward for _, reward, _ in ROLLOUTS]),
        old_logprobs=torch.full((len(words),), ELSE),
    )
    first = torch.zeros(len(calls), dtype=torch.int64)  # each is its rollout's first call
    spans = tk.Spans(torch.tensor(start), torch.tensor(end), torch.tensor(trajectory), first, len(words))
    return credit.Rollouts(
        batch,
        spans={"call": spans},
        span_rewards={"call": torch.tensor(rewards)},
        flags={"kept_the_secret": torch.tensor(["SECRET" not in text for text, *_ in ROLLOUTS])},
        teacher_logprobs=torch.tensor([HINT.get(word, ELSE) for word in words]),
    ), words


def expressions() -> list[tuple[str, credit.Spec]]:
    outcome = credit.outcome(scale="none")
    calls = outcome + 0.5 * credit.spans("call", scale="none")
    gated = calls.gate("kept_the_secret")
    bent = gated.asymmetric(positive=0.5)
    return [
        ("the outcome: whoever was right, against the mean", outcome),
        ("and half of what each call was worth, on the call's own tokens", calls),
        ("of those who kept the secret only: the other is neither praised nor compared", gated),
        ("success teaches half as much as failure", bent),
        ("and where it failed, what the hinted policy would not have said", bent + 0.1 * credit.directive("failed")),
    ]


def show(found: credit.Credit, words: list[str]) -> None:
    batch = found.rollouts.batch
    for begin, end in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
        columns = [t for t in range(begin, end) if batch.loss_mask[t]]
        values = [f"{found.advantages[t]:+.2f}" if found.mask[t] else "." for t in columns]
        print("  ".join(f"{words[t]:>8} {value:<5}" for t, value in zip(columns, values, strict=True)))


def main() -> list[credit.Credit]:
    given, words = rollouts()
    found = []
    for said, spec in expressions():
        print(f"\n{said}\n  {spec}")
        found.append(spec(given))
        show(found[-1], words)
    cu_seqlens, config = given.batch.cu_seqlens, tk.PolicyLoss("dapo")
    logprobs = given.batch.old_logprobs.clone().requires_grad_()  # a model's, in a trainer
    loss, _ = tk.policy_loss(logprobs, None, cu_seqlens=cu_seqlens, config=config, **found[-1].loss_inputs())
    loss.backward()
    print(f"\nin the loss {loss:+.4f}, which reads {', '.join(sorted(spec.needs))}")
    print("in TRL: trl.enable(trainer, credit=spec); in verl: verl.register(credit=spec)")
    return found


if __name__ == "__main__":
    main()
