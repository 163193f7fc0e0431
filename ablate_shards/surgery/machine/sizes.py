"""Numbers of bytes as people read them."""

__all__ = ["size_text"]

_UNITS = ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB"))


def size_text(count: int, digits: int = 3) -> str:
    """Returns a number of bytes with its unit, such as 3.78 MB, rounded to ``digits`` significant digits."""
    for unit, name in _UNITS:
        if count >= unit:
            rounded = float(f"{count / unit:.{digits}g}")
            return f"{rounded:,g} {name}"
    return f"{count} bytes"
