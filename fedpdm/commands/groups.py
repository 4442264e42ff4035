"""Commands that are groups of actions: `fedpdm node check`, `fedpdm federation start`, ..."""

from __future__ import annotations

import argparse
from typing import Any

__all__ = ["add_group"]


def add_group(commands: Any, name: str, *, summary: str, description: str) -> Any:
    """Add a command to the subparsers of `fedpdm`; the subparsers that its actions are added to.

    `summary` stands in the list of commands, `description` (lines as they are) in its own help.
    """
    parser = commands.add_parser(
        name,
        help=summary,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser.add_subparsers(required=True, metavar="ACTION")
