"""What the papers of the loss kinds, or the code that their authors released, clip with: plain data."""

from __future__ import annotations

from typing import NamedTuple


class Published(NamedTuple):
    """Options as they were published, or None with why there are none."""

    source: str
    options: dict[str, float] | None
    unless: str = ""


PUBLISHED = {
    "grpo": Published("arXiv 2402.03300", None, "it names no epsilon (DeepSeek-R1, arXiv 2501.12948, names 10)"),
    "dapo": Published("arXiv 2503.14476, section 4.1", {"clip_low": 0.2, "clip_high": 0.28}),
    "bnpo": Published(
        "github changyi7231/BNPO, recipe/bnpo/run.sh", {"clip_low": 0.2, "clip_high": 0.28, "clip_dual": 10.0}
    ),
    "dr_grpo": Published(
        "github sail-sg/understand-r1-zero and sail-sg/oat, ppo.py", {"clip_low": 0.2, "clip_high": 0.2}
    ),
    "gspo": Published("arXiv 2507.18071, section 5.1", {"clip_low": 3e-4, "clip_high": 4e-4}),
    "gmpo": Published("arXiv 2507.20673, section 4", {"clip_low": 0.4, "clip_high": 0.4}),
    "cispo": Published("arXiv 2506.13585", None, "it bounds ratios above alone, by a number that it does not name"),
    "sapo": Published("arXiv 2511.20347", {"sapo_tau_pos": 1.0, "sapo_tau_neg": 1.05}),
    "luspo": Published("arXiv 2602.05261, section 5.1", {"clip_low": 2e-3, "clip_high": 2.5e-3}),
    "vespo": Published(
        "arXiv 2602.10693, section 3.4",
        {"vespo_k_pos": 2.0, "vespo_lambda_pos": 3.0, "vespo_k_neg": 3.0, "vespo_lambda_neg": 2.0},
    ),
    "gpg": Published("arXiv 2504.02546", {}),
    "reinforce": Published("Williams, 1992", {}),
    "dppo_tv": Published("arXiv 2602.04879, the authors' script in verl", {"clip_low": 0.15, "clip_high": 0.15}),
    "dppo_kl": Published("arXiv 2602.04879, the authors' script in verl", {"clip_low": 0.05, "clip_high": 0.05}),
    "kl_cov": Published(
        "arXiv 2505.22617; github PRIME-RL/Entropy-Mechanism-of-RL, 7b_kl_cov.sh",
        {"cov_fraction": 2e-3, "cov_coef": 1.0},
    ),
    "clip_cov": Published(
        "arXiv 2505.22617; github PRIME-RL/Entropy-Mechanism-of-RL, 7b_clip_cov.sh",
        {
            "clip_low": 1.0,
            "clip_high": 1.0,
            "clip_dual": 10.0,
            "cov_fraction": 2e-4,
            "cov_low": 1.0,
            "cov_high": 5.0,
        },
    ),
}
