"""What a teacher is: its input, its output, what identifies it, and how it is run.

Axes: B images, H and W pixels of the teacher's input, Gh and Gw cells of its patch grid, C feature channels,
D embedding dimensions; 20 is the number of VOC classes, in the devkit's order.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from data.errors import TeacherError
from data.images import DECODER, Resample, squash

from .registry import Precision


@dataclass(frozen=True)
class TeacherInput:
    """What a worker must know to prepare images for a teacher; plain values, cheap to pickle.

    size: (H, W) in px, reached by one antialiased resize from the original image (`data.images.squash`).
    resample: the resize filter.  mean, std: per RGB channel on a 0..1 scale; the teacher applies them itself.
    """

    size: tuple[int, int]
    resample: Resample
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True, eq=False)
class TeacherOutput:
    """What a teacher says of a batch: float32, contiguous, on the teacher's device, without gradient.

    features: [B, Gh, Gw, C]; cell (i, j) covers rows i·H/Gh … and columns j·W/Gw … of the input.
    logits: [B, 20]; logit scale × cosine, plus the logit bias of a model that has one.
    embeddings: [B, D]; L2-normalised.
    """

    features: Tensor | None = None
    logits: Tensor | None = None
    embeddings: Tensor | None = None

    def arrays(self) -> dict[str, Tensor]:
        """Return the outputs that are present, by name."""
        named = {"features": self.features, "logits": self.logits, "embeddings": self.embeddings}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


@dataclass(kw_only=True, eq=False)
class Teacher(ABC):
    """A frozen network, called on uint8 images [B, H, W, 3] of its input size.

    name: its spec in the registry, in canonical form.  library: the distribution whose code computes the output.
    architecture: JSON-able values that, with the library, fix the network.  layer, norm: what is read off, and the
    normalisation it has passed.  output_shapes: per-sample shape of every array, as in {"features": (30, 30, 384)}.
    weights_digest: of all weights, text tower included.  weights_source: where they came from, in words.
    precision: that of the computation; what is handed out is float32 in any case.
    text_embeddings: [20, D] float32, or None for a teacher without prompts.
    """

    name: str
    library: str
    architecture: Mapping[str, Any]
    layer: str
    norm: str
    input: TeacherInput
    patch_grid: tuple[int, int] | None
    output_shapes: dict[str, tuple[int, ...]]
    weights_digest: str
    weights_source: str
    untrained: bool
    module: nn.Module = field(repr=False)
    precision: Precision = "float32"
    text_embeddings: NDArray[np.float32] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.module.requires_grad_(False).eval()
        # Kept on the device: to make them there in every call would wait for all that the device has yet to do.
        self._mean, self._std = (torch.tensor(values).view(1, 3, 1, 1) for values in (self.input.mean, self.input.std))

    @abstractmethod
    def forward(self, pixels: Tensor) -> TeacherOutput:
        """Return the output for normalised pixels [B, 3, H, W] float32 on the teacher's device."""

    def __call__(self, images: Tensor) -> TeacherOutput:
        """Return the output for uint8 images [B, H, W, 3] from any device, computed in the teacher's own precision.

        That of the caller (autocast, TF32) does not matter.

        Raises ValueError for images of another dtype or size: resizing here would be a second resize.
        """
        expected = (*self.input.size, 3)
        if images.dtype != torch.uint8 or images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(
                f"{self.name}: expected uint8 images [B, {', '.join(map(str, expected))}],"
                f" found {images.dtype} {list(images.shape)}"
            )
        device = next(self.module.parameters()).device
        with torch.inference_mode(), self._autocast(device), _plain_float32():
            output = self.forward(self._normalise(images.to(device, non_blocking=True)))
        # Copied outside inference mode: autograd refuses an inference tensor as the target of a loss.
        copies = {
            name: tensor.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
            for name, tensor in output.arrays().items()
        }
        return TeacherOutput(**copies)

    def to(self, device: torch.device | str) -> Self:
        """Move the network to a device and return the teacher."""
        self.module.to(device)
        self._mean, self._std = self._mean.to(device), self._std.to(device)
        return self

    def identity(self) -> dict[str, Any]:
        """Return everything that determines the output, JSON-able: equal identities mean interchangeable targets."""
        return {
            "spec": self.name,
            "library": self.library,
            "architecture": dict(self.architecture),
            "weights_digest": self.weights_digest,
            "input_size": list(self.input.size),
            "decoder": DECODER,
            "resample": self.input.resample,
            "antialias": True,
            "mean": list(self.input.mean),
            "std": list(self.input.std),
            "layer": self.layer,
            "norm": self.norm,
            "patch_grid": None if self.patch_grid is None else list(self.patch_grid),
            "compute_dtype": "float32",
            "autocast": None if self.precision == "float32" else self.precision,
            "tf32": False,
        }

    def provenance(self) -> dict[str, Any]:
        """Return what explains the output without determining it: library versions and the weights' origin."""
        packages = sorted({self.library, "torch", "numpy", "pillow"})
        return {
            "weights_source": self.weights_source,
            "versions": {package: importlib.metadata.version(package) for package in packages},
        }

    def _autocast(self, device: torch.device) -> torch.autocast:
        if self.precision == "float32":
            return torch.autocast(device.type, enabled=False)
        return torch.autocast(device.type, dtype=getattr(torch, self.precision))

    def _normalise(self, images: Tensor) -> Tensor:
        pixels = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format).div_(255.0)
        return pixels.sub_(self._mean).div_(self._std)


@contextmanager
def _plain_float32() -> Iterator[None]:
    # cuDNN convolves in TF32 unless told otherwise, and a process may have allowed it for matrix products too.
    backends: Any = torch.backends
    switches = (
        backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv,
    )  # fmt: skip
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        yield
    finally:
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision


def grid_of(input_size: tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Return the patch grid (Gh, Gw) of an input size (H, W) in px.

    Raises TeacherError where the patches do not tile the input: a strided convolution would silently drop the rest.
    """
    height, width = input_size
    if height % patch_size or width % patch_size:
        raise TeacherError(
            f"expected an input size that is a multiple of the patch size {patch_size}, found {height}×{width}"
        )
    return height // patch_size, width // patch_size


def weights_digest(weights: nn.Module | Mapping[str, Tensor]) -> str:
    """Return the SHA-256, in hex, of a module's persistent tensors or of a state dict.

    Tensors enter sorted by name, each as name, dtype, shape and bytes, so every file layout of the same weights agrees.
    """
    tensors = weights.state_dict() if isinstance(weights, nn.Module) else weights
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# Four cells, none of them alike under a flip or a transposition of the grid, as fractions of its height and width.
_PROBED_CELLS = ((0.1, 0.2), (0.3, 0.9), (0.6, 0.4), (0.8, 0.7))


def probe(teacher: Teacher) -> NDArray[np.float32]:
    """Return the teacher's output on one fixed synthetic image as a vector of a few kB.

    It holds the features at four cells, then embeddings and logits whole. Each part is centred and scaled to unit
    length, so that none drowns another: two probes of one teacher have cosine ≥ 0.9999 on any machine.
    """
    pixels = squash(draw_probe_image(), teacher.input.size, teacher.input.resample)
    arrays = {
        name: tensor[0].cpu().numpy() for name, tensor in teacher(torch.from_numpy(pixels)[None]).arrays().items()
    }
    parts = [arrays[name] for name in ("embeddings", "logits") if name in arrays]
    if "features" in arrays:
        height, width = arrays["features"].shape[:2]
        parts = [arrays["features"][int(y * height), int(x * width)] for y, x in _PROBED_CELLS] + parts
    centred = [part - part.mean() for part in parts]
    return np.concatenate([part / np.linalg.norm(part) for part in centred]).astype(np.float32)


def draw_probe_image() -> Image.Image:
    """Return the probe's image, 500×375 RGB: ramps, a disc, stripes and a texture, in integer arithmetic."""
    y, x = np.mgrid[0:375, 0:500]
    red = (x * 255) // 499
    green = (y * 255) // 374
    blue = (x * 7 + y * 13 + (x * y) // 5) % 256
    disc = (x - 340) ** 2 + (y - 130) ** 2 < 80**2
    stripes = (x < 200) & (y > 220) & ((x // 12 + y // 30) % 2 == 0)
    image = np.stack([np.where(disc, 230, red), np.where(stripes, 20, green), np.where(disc, 40, blue)], axis=-1)
    return Image.fromarray(image.astype(np.uint8))
