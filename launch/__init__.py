"""Wiring and verbs; and, for notebooks and scripts, ``from launch import train, train_steps``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from launch.api import Run, train, train_steps

__all__ = ["Run", "train", "train_steps"]


def __getattr__(name: str) -> Any:
    """Imported when it is asked for: every verb imports this package."""
    if name in __all__:
        from launch import api

        return getattr(api, name)
    raise AttributeError(f"module launch has no attribute {name}")
