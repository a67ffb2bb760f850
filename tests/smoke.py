"""What a fresh install must do: run by its interpreter, with nothing but the wheel, torch and numpy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

import trajkern as tk


def main() -> None:
    native = "--pure" not in sys.argv
    here = Path(__file__).resolve().parent.parent
    assert here not in Path(str(tk.__file__)).resolve().parents, "the source tree was imported, not what is installed"
    assert (tk.backends()["native"] == "available") is native, tk.backends()
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 300, generator=generator, requires_grad=True)
    targets, cu_seqlens = torch.randint(300, (6,), generator=generator), torch.tensor([0, 2, 6])
    advantages = tk.group_advantages(torch.tensor([1.0, 0.0]), torch.tensor([7, 7]))
    found = []
    for backend in ("native" if native else "reference", "reference"):
        with tk.use_backend(backend):
            logprobs = tk.token_logprobs(logits, targets, temperature=0.8)
            loss, _ = tk.policy_loss(logprobs, logprobs.detach() - 0.1, advantages, cu_seqlens, config=tk.PolicyLoss())
            found.append((loss.detach(), *torch.autograd.grad(loss, logits)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    assert tk.Tree(torch.tensor([-1, 0, 0]), torch.tensor([2, 1, 1])).num_leaves == 2
    assert tk.Spans.turns(torch.tensor([False, True, True, False]), torch.tensor([0, 4])).end.tolist() == [3]
    told = subprocess.run([sys.executable, "-m", "trajkern", "info"], check=True, capture_output=True, text=True).stdout
    assert told.startswith(f"trajkern {tk.__version__}\n") and told.count("_C is not built") == (not native)
    print(
        f"trajkern {tk.__version__} works: Python {sys.version.split()[0]}, torch {torch.__version__}, native {native}"
    )


if __name__ == "__main__":
    main()
