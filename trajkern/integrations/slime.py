"""slime (0.3.1): trajkern's advantages by its path flag.

    --custom-advantage-function-path trajkern.integrations.slime.advantages

Read at slime's commit 624b824a898a.
"""

from __future__ import annotations

from trajkern.integrations._slime_credit import advantages

__all__ = ["advantages"]
