"""Named tensors <-> safetensors files, whole or not at all. Knows nothing of what the tensors mean."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def save_tensors(tensors: Mapping[str, Tensor], file: Path, *, metadata: dict[str, str] | None = None) -> None:
    """Writes beside `file` and renames over it; makes the folder where it is missing.

    Raises: OSError, naming `file`.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_name(f".{file.name}.partial")
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, fresh, metadata)
        os.replace(fresh, file)
    except SafetensorError as error:  # a full disk, for one, does not come as an OSError
        raise OSError(f"{file}: cannot be written: {error}") from error
    finally:
        fresh.unlink(missing_ok=True)
