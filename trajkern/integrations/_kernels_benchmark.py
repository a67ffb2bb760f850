"""Times of trajkern's kernels beside torch: `kernels benchmark ./FOLDER`, or by the kernel's name on the Hub."""

import torch
from kernels.benchmark import Benchmark


class TokenStats(Benchmark):
    """Log p of the next tokens, and its gradient, from a language model's logits in bfloat16."""

    seed = 0

    def setup(self) -> None:
        rows, vocabulary = (4, 300) if self.device == "cpu" else (1024, 151_936)  # a CPU has Triton's interpreter only
        self.logits = torch.randn(rows, vocabulary, device=self.device, dtype=torch.bfloat16)
        self.targets = torch.randint(vocabulary, (rows,), device=self.device)
        self.problem = self.targets, None, 1.0, None  # one temperature, no mask
        self.saved = self.kernel.logprob.token_stats(self.logits, *self.problem, 0)
        self.grads = torch.randn(rows, dtype=torch.float32, device=self.device)

    def benchmark_forward(self) -> None:
        self.out, *_ = self.kernel.logprob.token_stats(self.logits, *self.problem, 0)

    def verify_forward(self) -> torch.Tensor:
        return self.logits.float().log_softmax(-1).gather(1, self.targets[:, None]).squeeze(1)

    def benchmark_backward(self) -> None:
        backward = self.kernel.logprob.token_stats_backward
        self.out = backward(self.grads, None, self.logits, *self.problem, *self.saved, None)

    def verify_backward(self) -> torch.Tensor:
        grad = self.logits.float().softmax(-1).mul_(-self.grads[:, None])
        return grad.scatter_add_(1, self.targets[:, None], self.grads[:, None]).to(self.logits.dtype)
