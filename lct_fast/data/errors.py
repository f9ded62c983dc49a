"""What goes wrong with data: one class, one line."""


class DataError(ValueError):
    """Data that cannot be used: what was expected, what came, what to do next, in one line."""


def reason(error: BaseException) -> str:
    """The first line of what an exception says, or its type where it says nothing."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
