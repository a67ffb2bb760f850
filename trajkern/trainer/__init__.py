"""The thin reference trainer. Importing this package loads nothing heavy; ``cli_main`` runs it."""

from __future__ import annotations

import contextlib
import sys
import traceback
from pathlib import Path


def cli_main(argv: list[str]) -> int:
    """Run the trainer on command-line arguments; returns the exit status: 2 after a bad argument, 1 where a file,
    another rank or a task's or a credit's code failed, memory ran out or the run diverged, 130 after Ctrl-C, 143 after
    SIGTERM, 129 after SIGHUP. Python's development mode (``python -X dev -m trajkern train``) shows the traceback of a
    failure."""
    from trajkern._no_memory import ran_out
    from trajkern._start import say
    from trajkern.trainer.config import parse
    from trajkern.trainer.folder import ResultsError
    from trajkern.trainer.ranks import RankError
    from trajkern.trainer.stopping import Interrupted
    from trajkern.trainer.theirs import is_refusal
    from trajkern.trainer.train import train

    with contextlib.suppress(OSError):  # of a current folder that is gone
        folder = str(Path.cwd())
        if not {"", folder} & set(sys.path):
            sys.path.append(folder)  # where flags may name modules, as under python -m
    try:
        train(parse(argv))
    except Interrupted as stopped:
        say(str(stopped))
        return stopped.status
    except KeyboardInterrupt:
        say("stopped at once; the last checkpoint, where there is one, stands")
        return 130
    except (TypeError, ValueError, ImportError) as error:
        if isinstance(error, TypeError) and not is_refusal(error):
            raise
        say(f"trajkern train: {error}")
        return 2
    except ResultsError as error:
        if sys.flags.dev_mode:
            traceback.print_exception(error)
        say(f"trajkern train: {error}")
        return 1
    except RankError as error:
        say(f"trajkern train: {error}; the last checkpoint stands")
        return 1
    except Exception as error:
        if (words := ran_out(error)) is None:
            raise
        say(f"trajkern train: {words}")
        return 1
    return 0
