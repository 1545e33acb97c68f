"""ONNX files that end in a digest of all that stands before it, so that a damaged one is refused."""

from __future__ import annotations

import hashlib
from pathlib import Path

KEY = "moesaic.sha256"
"""The entry of a file's metadata that holds the digest."""
_DIGITS = 64
_ENTRY = b"\x0a" + bytes([len(KEY)]) + KEY.encode() + b"\x12" + bytes([_DIGITS])
_HEAD = b"\x72" + bytes([len(_ENTRY) + _DIGITS]) + _ENTRY
"""What stands before the digits: field 14 of ONNX's ModelProto is an entry of the metadata, a key and a value."""
_CHUNK = 1 << 20


def seal(path: Path) -> None:
    """Append the digest of an ONNX file to it, as the last entry of its metadata.

    The fields of a protocol buffer may come in any order, so that every reader takes the file as it did before.
    """
    digest = _digest(path, path.stat().st_size)
    with path.open("ab") as file:
        file.write(_HEAD + digest.encode())


def check_seal(path: Path) -> str:
    """Return the digest that an ONNX file ends in.

    Raises:
        OSError: the file cannot be read.
        ValueError: it has none, or another one than its content.
    """
    size = path.stat().st_size - len(_HEAD) - _DIGITS
    tail = b""
    if size >= 0:
        with path.open("rb") as file:
            file.seek(size)
            tail = file.read()
    if not tail.startswith(_HEAD):
        raise ValueError(f"{path} is cut, or moesaic export has not written it: it does not end in a digest")
    digest = _digest(path, size)
    if tail[len(_HEAD) :] != digest.encode():
        raise ValueError(f"{path} is damaged: it is not as moesaic export has written it")
    return digest


def _digest(path: Path, size: int) -> str:
    """Return the SHA-256 of a file's first bytes, in hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while size > 0 and (chunk := file.read(min(size, _CHUNK))):
            digest.update(chunk)
            size -= len(chunk)
    return digest.hexdigest()
