"""Paths as people write them."""

from __future__ import annotations

from pathlib import Path

from radit_jax.errors import InputError


def last_part(source: str) -> str:
    """A path, as text, without the folders it lies in, which are nobody's business."""
    return source.rstrip("/").rpartition("/")[2]


def named(name: str | Path) -> Path:
    """The path of `name`, "~" included. InputError for what no file system takes: an unknown "~user", a name too long, a NUL."""
    try:
        path = Path(name).expanduser()
        path.stat()
    except FileNotFoundError:
        pass
    except (OSError, RuntimeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        shown = repr(str(name)) if len(str(name)) <= 80 else repr(str(name)[:80]) + "…"
        raise InputError(f"{shown} cannot be looked up: {reason}") from error
    return path
