"""Text files whose words are names of files: options, lists of classes, pairs.

A name is bytes to the system and a ``str`` to Python, which depends on the locale and holds surrogates for bytes that
the locale does not know. Files have names with their own bytes. So a file is the same in every locale, and a name that
is read from it opens the right file. Only a line feed ends a line: ``str.splitlines`` would also cut at
characters that occur in names.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Iterable

# Control characters except the line feed, and those that change the direction of text. Surrogates replace bytes of a
# file's name that are not UTF-8.
_UNSAFE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2028\u2029\u2066-\u2069\ud800-\udfff]")


def encode(text: str) -> bytes:
    r"""Return the bytes of text with names in it, each name as the system has it.

    >>> encode("caf\udce9")
    b'caf\xe9'
    """
    return os.fsencode(text)


def decode(data: bytes) -> str:
    r"""Return the text of a file's bytes, the opposite of :func:`encode`.

    A byte order mark is left out; UTF-16 is recognized by its own.

    Raises:
        UnicodeDecodeError: if it is damaged UTF-16.

    >>> decode(b"\xef\xbb\xbfone"), decode("one".encode("utf-16"))
    ('one', 'one')
    """
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        data = data.decode("utf-16").encode()
    return os.fsdecode(data.removeprefix(codecs.BOM_UTF8))


def lines(data: bytes) -> list[str]:
    r"""Return the lines of a text file, without their ends.

    A line feed ends a line, with a carriage return before it or not; in a file without line feeds a carriage return
    does.

    >>> lines("a\x85b\u2028c\r\nd\n".encode())
    ['a\x85b\u2028c', 'd']
    """
    text = decode(data)
    end = "\n" if "\n" in text else "\r"
    found = text.split(end)
    return [line.removesuffix("\r") for line in (found if found[-1] else found[:-1])]


def encode_names(names: Iterable[str]) -> bytes:
    r"""Return a list of names as text, a line each, the same in every locale.

    A name that a reader might cut into lines, or that begins with a quotation mark, is written as a JSON string.

    >>> encode_names(["ann", "a;b"])
    b'ann\na;b\n'
    """
    return b"".join(_encode_name(name) + b"\n" for name in names)


def _encode_name(name: str) -> bytes:
    stored = encode(name)
    universal = stored.decode("utf-8", "surrogateescape")
    plain = universal.splitlines() == [universal] and not universal.startswith('"')
    return stored if plain else json.dumps(universal).encode()


def decode_names(data: bytes) -> list[str]:
    """Return the names that :func:`encode_names` wrote.

    Raises:
        ValueError: if a line begins with a quotation mark and is not a JSON string.
    """
    return [_decode_name(line) for line in data.split(b"\n") if line]


def _decode_name(line: bytes) -> str:
    return decode(json.loads(line).encode("utf-8", "surrogateescape") if line.startswith(b'"') else line)


def is_whole(text: str, digits: int = 18) -> bool:
    """Return true if a text is a whole number of at most so many digits; int64 holds each number of 18.

    >>> is_whole("0042"), is_whole("-1"), is_whole("²")
    (True, False, False)
    """
    return text.isascii() and text.isdigit() and len(text) <= digits


def counted(count: int, noun: str) -> str:
    """Return a number of things in words.

    >>> counted(1, "seed"), counted(3, "seed")
    ('1 seed', '3 seeds')
    """
    return f"{count} {noun}{'' if count == 1 else 's'}"


def listed(values: Iterable[object], word: str = "and") -> str:
    """Return two or more values as a list in words.

    >>> listed([5.0, 20.0, 110.0]), listed(["a", "b"], "or")
    ('5, 20 and 110', 'a or b')
    """
    *others, last = (f"{value:g}" if isinstance(value, float) else str(value) for value in values)
    return f"{', '.join(others)} {word} {last}"


def printable(text: str) -> str:
    r"""Return ``text`` with the characters that a reader would obey, or could not encode, as Python writes them.

    These are control characters, those that change the direction of text, and surrogates.

    >>> print(printable("evil\x1b[2Jname.png"))
    evil\x1b[2Jname.png
    """
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode("ascii"), text)
