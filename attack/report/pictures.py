"""Tensors -> pictures that live inside an HTML file, as data URIs."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

from torch import Tensor

from attack.answer import to_picture, to_png
from attack.shades import Shades

FRAME_MS, LAST_FRAME_MS = 140, 2500


def still(example: Tensor, shades: Shades | None) -> str | None:
    """A PNG of one example; None where its shape is not a picture's."""
    picture = to_picture(example, shades)
    return None if picture is None else _uri(to_png(picture))


def animation(frames: Sequence[Tensor], shades: Shades | None) -> str | None:
    """An animated PNG of one example over iterations, with a rest on the last; None where there is nothing to show."""
    pictures = [picture for frame in frames if (picture := to_picture(frame, shades)) is not None]
    if len(pictures) < 2:
        return None
    buffer = io.BytesIO()
    first, *others = pictures
    first.save(
        buffer,
        format="PNG",
        save_all=True,
        append_images=others,
        duration=[FRAME_MS] * len(others) + [LAST_FRAME_MS],
        loop=0,
    )
    return _uri(buffer.getvalue())


def _uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
