"""What a person can get wrong, as one exception type: the launch scripts print it as one line and exit 2."""


class InputError(ValueError):
    """Bad input from a person: a file, line, field, checkpoint or shape.

    The message is one line that says what was found, what was expected, and where (file:line, field, tensor name).
    """

    def __init__(self, message: object):
        super().__init__(" ".join(str(message).splitlines()))  # a name that it repeats may have several


class TrainingDiverged(RuntimeError):
    """A loss that is not finite; the message names the step, the examples in the batch and the last good checkpoint."""
