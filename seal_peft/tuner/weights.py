"""The weights file of an adapter: whether it is whole."""

from __future__ import annotations

import json
import os


def check_weights_file(path: str) -> None:
    """Refuse a safetensors file that is cut off or damaged; a missing file is left to the loader.

    Raises:
        ValueError: The size of the file is not what its header announces.
    """
    if not os.path.isfile(path):
        return
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little") if len(start) == 8 else size
        try:
            header = json.loads(file.read(length)) if 8 + length <= size else {}
            end = (
                8
                + length
                + max(
                    (entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0
                )
            )
        except (ValueError, TypeError, KeyError, AttributeError):
            end = None
    if end != size:
        raise ValueError(
            f"The adapter file {path} is cut off or damaged ({size} bytes"
            + (f", its header announces {end}" if end else ", no readable header")
            + "). Save the adapter again, or download it again."
        )
