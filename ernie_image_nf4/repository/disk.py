"""Whether an error means that a disk is full, whichever library it comes from."""

from __future__ import annotations

import errno
import re

FULL = {errno.ENOSPC, errno.EDQUOT}
# In the message where an error has no number: tokenizers and safetensors, in Rust, and shutil.copytree.
NUMBER = re.compile(r"(?:\(os error |\[Errno )(\d+)")


def is_full(error: BaseException | None) -> bool:
    """Whether this error, or one that led to it, says that a disk is full or a quota used up."""
    while error is not None:
        if FULL & {getattr(error, "errno", None), *map(int, NUMBER.findall(str(error)))}:
            return True
        error = error.__cause__ or error.__context__
    return False
