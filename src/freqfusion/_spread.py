"""Some of many, for tables and pictures."""


def spread(length: int, wanted: int | None) -> list[int]:
    """So many of ``range(length)``, evenly spread, or all.

    >>> spread(10, 4), spread(2, 6), spread(3, None)
    ([1, 3, 6, 8], [0, 1], [0, 1, 2])
    """
    count = length if wanted is None else min(length, wanted)
    return [(2 * place + 1) * length // (2 * count) for place in range(count)]
