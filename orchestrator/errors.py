"""The errors that a user of Bitatlas may see."""


class BitatlasError(Exception):
    """A user-facing error: one sentence that says what, where, the rule and the remedy."""


class DamagedFileError(BitatlasError):
    """A file that Bitatlas wrote is gone or not as it was written: what it held is to be made again."""


def reason(error: Exception) -> str:
    """Another library's error as one line, with its type where that is no ValueError or OSError."""
    lines = str(error).strip().splitlines() or [""]
    text = lines[0] if len(lines) == 1 or not lines[0].endswith(":") else f"{lines[0]} {lines[1].strip()}"
    return text if text and isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {text}"
