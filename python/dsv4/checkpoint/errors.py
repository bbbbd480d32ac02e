"""The one error of this package."""

from collections.abc import Sequence

_SHOWN = 2000


class CheckpointError(ValueError):
    """A folder that cannot be read as a checkpoint, or whose tensors are not those its configuration calls for.

    The message is one line. `problems` holds one line for every tensor at fault; the message names them all (the first
    2000 where there are more).
    """

    def __init__(self, summary: str, problems: Sequence[str] = ()):
        self.problems = tuple(problems)
        if problems:
            more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
            noun = "problem" if len(problems) == 1 else "problems"
            summary = f"{summary}: {len(problems)} {noun}: {'; '.join(problems[:_SHOWN])}{more}"
        super().__init__(summary)
