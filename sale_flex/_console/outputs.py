# SPDX-License-Identifier: BSD-3-Clause
"""Whether files that a command will write can be written, asked before the work and without a trace."""

import os
from pathlib import Path


def check_writable(option: str, path: Path) -> None:
    """Find out whether a file can be written.

    Args:
        option: What the path is from.
        path: Of the file, which may be there already.

    Raises:
        OSError: It can not; the message names the option.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{option} {path} must be a file, got a folder; name a file in it")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{option} {path} is in no folder there is")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise PermissionError(f"{option} {path} can not be written; name a file in a folder that is yours")


def check_folder(option: str, folder: Path) -> None:
    """Find out whether a folder can be made, or written to if it is there.

    Args:
        option: What the path is from.
        folder: Its path.

    Raises:
        OSError: It can not; the message names the option.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists() or path.is_symlink())
    if not there.is_dir():
        raise NotADirectoryError(f"{option} {folder} must be a folder, and {there} is none; name another")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"{option} {folder} can not be written: {there} is not yours to write to; name another")
