"""Pictures small enough to carry in a page."""

from __future__ import annotations

import base64
from io import BytesIO

from PIL import Image

LONGER_SIDE_PX = 480
_QUALITY = 72


def thumbnail(image: Image.Image) -> str:
    """Return an image as a `data:` address: JPEG, its longer side at most LONGER_SIDE_PX, without metadata."""
    scale = min(1.0, LONGER_SIDE_PX / max(image.size))
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    small = image.convert("RGB").resize(size, Image.Resampling.LANCZOS) if scale < 1 else image.convert("RGB")
    data = BytesIO()
    small.save(data, "JPEG", quality=_QUALITY, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"
