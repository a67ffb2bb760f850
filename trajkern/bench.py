"""Time functions of your own beside trajkern's ops: :func:`compare`.

The command ``trajkern bench`` times the ops themselves; its cases and clocks are the same.
"""

from trajkern._bench.compare import Comparison, compare, shapes_of

__all__ = ["Comparison", "compare", "shapes_of"]
