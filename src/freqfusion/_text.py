"""Text of the user's for the screen."""


def readable(text: str, longest: int | None = 60) -> str:
    r"""One line without control characters, shortened to so many letters where a number is given.

    >>> readable("a\x1b[31m\nb"), readable("street" * 3, longest=8)
    ('a\\x1b[31m\\nb', 'streets…')
    """
    shown = "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
    return shown if longest is None or len(shown) <= longest else f"{shown[: longest - 1]}…"
