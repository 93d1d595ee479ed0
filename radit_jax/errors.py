"""What a person can get wrong, as one exception type: the launch scripts print it as one line and exit 2."""

from __future__ import annotations

LONGEST = 1_500  # characters of a message: what it repeats (an id, a record, a name) may be as long as a file


class InputError(ValueError):
    """Bad input from a person: a file, line, field, checkpoint or shape.

    The message is one line that says what was found, what was expected, and where (file:line, field, tensor name).
    """

    def __init__(self, message: object):
        line = " ".join(str(message).splitlines())  # a name that it repeats may have several
        if len(line) > LONGEST:
            line = f"{line[: LONGEST // 2]} … {line[-LONGEST // 3 :]}"
        super().__init__(line)


class TrainingDiverged(RuntimeError):
    """A loss that is not finite; the message names the step, the examples in the batch and the last good checkpoint."""
