"""What goes wrong with data: one class, one line."""


class DataError(ValueError):
    """Data that cannot be used: what was expected, what came, what to do next, in one line."""
