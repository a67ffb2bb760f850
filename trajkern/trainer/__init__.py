"""The thin reference trainer. Importing this package loads nothing heavy; ``cli_main`` runs it."""

from __future__ import annotations

import sys
from pathlib import Path


def cli_main(argv: list[str]) -> int:
    """Run the trainer on command-line arguments; returns the exit status (130 after Ctrl-C, 2 after a bad argument,
    1 where another rank failed)."""
    from trajkern.trainer.config import parse
    from trajkern.trainer.ranks import RankError, Terminated
    from trajkern.trainer.run import Interrupted
    from trajkern.trainer.train import train

    folder = str(Path.cwd())
    if not {"", folder} & set(sys.path):
        sys.path.append(folder)  # where flags may name modules, as under python -m
    try:
        train(parse(argv))
    except Interrupted as stopped:
        print(f"interrupted; continue with --resume {stopped.args[0]}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("stopped at once; the last regular checkpoint stands", file=sys.stderr)
        return 130
    except (ValueError, ImportError) as error:
        print(f"trajkern train: {error}", file=sys.stderr)
        return 2
    except RankError as error:
        print(f"trajkern train: {error}; the last checkpoint stands", file=sys.stderr)
        return 1
    except Terminated:
        print("stopped by SIGTERM; the last checkpoint stands", file=sys.stderr)
        return 143
    return 0
