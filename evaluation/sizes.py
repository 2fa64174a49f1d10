"""COCO's three sizes of objects, by the area of the box in pixels of the original image.

For AP of one size, objects of other sizes are ignored like difficult ones, and so are detections of other sizes that
are matched with no object. An area on a boundary belongs to both sides, as in pycocotools. COCO itself measures masks
where it has them; VOC only has boxes.

Source: https://cocodataset.org/#detection-eval; Params.areaRng of pycocotools.
"""

from __future__ import annotations

SIZES: dict[str, tuple[float, float]] = {
    "small": (0.0, 32.0**2),
    "medium": (32.0**2, 96.0**2),
    "large": (96.0**2, float("inf")),
}
