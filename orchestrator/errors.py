"""The errors that a user of Bitatlas may see."""


class BitatlasError(Exception):
    """A user-facing error: one sentence that says what, where, the rule and the remedy."""
