"""Values read from a json: the one definition of ids, file names and flags, for all readers of COCO files."""

import gc
import json
import re

_INT64 = 2**63
LONGEST = 60  # characters of a value in a message


def parse_json(data: bytes):
    """Return the content of a json in UTF-8 (with or without a byte order mark), UTF-16 or UTF-32.

    The cycle collector pauses meanwhile: visiting the million records again and again doubles the time.
    Raises `ValueError` for what is not json, `RecursionError` for json nested too deeply.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        return json.loads(data)
    finally:
        if enabled:
            gc.enable()


def shown(value) -> str:
    """Return `value` for a message: on one line, cut when it is long."""
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def is_whole(value) -> bool:
    """Whether `value` is a whole number that fits 64 bits, and not True or False."""
    return type(value) is int and -_INT64 <= value < _INT64


def is_encodable(text: str) -> bool:
    """Whether `text` can be written as UTF-8; a json can spell half of a surrogate pair, which cannot."""
    return not re.search("[\ud800-\udfff]", text)


def is_file_name(value) -> bool:
    """Whether `value` can name a file: a text that is not empty, encodable, without NUL."""
    return isinstance(value, str) and value != "" and "\0" not in value and is_encodable(value)


def is_flag(value) -> bool:
    """Whether `value` says yes or no as `iscrowd` does: 0, 1, false, true, or nothing."""
    return value is None or (isinstance(value, (bool, int, float)) and value in (0, 1))
