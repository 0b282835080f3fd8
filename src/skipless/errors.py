"""What a user can be told: input that cannot be used (exit code 2)."""


class InputError(ValueError):
    """Bad input or usage. The message is one line: tensor or field, expected, found, what to do."""
