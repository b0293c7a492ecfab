# SPDX-License-Identifier: BSD-3-Clause
"""The flags that commands have."""

import re

from sale_flex import cli

FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*")


def flags_of(command: str) -> set[str]:
    """The options of a command, those of the program included."""
    parser = cli._parser(command)
    (commands,) = (action.choices for action in parser._actions if action.dest == "command")
    return {*parser._option_string_actions, *commands[command]._option_string_actions}
