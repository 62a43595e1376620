"""Names of the ops that torch.compile sees through."""

import hashlib
from pathlib import Path


def op_name(name: str, *sources: str) -> str:
    """The name of an op, with a digest of the files that its code is in.

    torch.compile's caches on disk know such an op by its name alone: after a change they would serve the code before.
    """
    code = b"".join(Path(source).read_bytes() for source in sources)
    return f"upit::{name}_{hashlib.sha256(code).hexdigest()[:8]}"
