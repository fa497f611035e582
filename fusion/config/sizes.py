"""Sizes of memory as people write them."""

import re

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:iB|B)?", re.IGNORECASE)


def num_bytes(size: str) -> int:
    """Bytes of "2GiB", "512M", "1.5 GB"; units are powers of 1024.

    Raises:
        ValueError: `size` is not written like that.
    """
    parts = SIZE.fullmatch(size.strip())
    if not parts:
        raise ValueError(f"'{size}' is no size such as 2GiB or 512MiB")
    return int(float(parts[1]) * UNITS[parts[2].upper()])
