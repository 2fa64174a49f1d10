"""A devkit small enough to be broken by hand, one file at a time."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

CAT = (
    "<object><name>cat</name><difficult>0</difficult>"
    "<bndbox><xmin>11</xmin><ymin>21</ymin><xmax>30</xmax><ymax>60</ymax></bndbox></object>"
)


class TinyDevkit:
    """A VOC2007 folder below `root` whose images are 100×80 (width × height) unless told otherwise."""

    def __init__(self, root: Path, year: int = 2007) -> None:
        self.root = root
        self.folder = root / f"VOC{year}"
        for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
            (self.folder / name).mkdir(parents=True)

    def add(self, stem: str, objects: str = CAT, size: tuple[int, int] | None = (100, 80)) -> None:
        """Write a grey image of 100×80 and an annotation that claims `size` (width, height), or none."""
        Image.new("RGB", (100, 80), (90, 90, 90)).save(self.image(stem))
        self.annotate(stem, f"<annotation><filename>{stem}.jpg</filename>{_size(size)}{objects}</annotation>")

    def annotate(self, stem: str, xml: str | bytes) -> Path:
        """Replace an annotation and return its path."""
        path = self.folder / "Annotations" / f"{stem}.xml"
        path.write_bytes(xml if isinstance(xml, bytes) else xml.encode())
        return path

    def image(self, stem: str) -> Path:
        return self.folder / "JPEGImages" / f"{stem}.jpg"

    def list(self, split: str, stems: Sequence[str]) -> Path:
        """Write an image set and return its path."""
        path = self.folder / "ImageSets" / "Main" / f"{split}.txt"
        path.write_text("".join(f"{stem}\n" for stem in stems))
        return path


def _size(size: tuple[int, int] | None) -> str:
    return "" if size is None else f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>"
