"""What a model's image processor does to an image, read off the processor: resize, crop, padding, patches, numbers.

A plan holds geometry and names only; `preprocess_host` and `preprocess_device` carry it out, and
`preprocess_choice` checks it against the processor before anyone trusts it. It is derived where the processor's
steps are transformers' own methods and not where a class has overridden one of them, whatever the class is called.
This module knows nothing about pixels, tokens, threads or devices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import PIL

from mmextract.kernels.resample import Filter, Mode
from mmextract.kernels.resize_second import Patches

Size = tuple[int, int]
"""(height, width), in pixels."""

FILTER_NAMES: dict[int, Filter] = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""Pillow's numbers of the filters that the kernels know."""


class NoPlanError(Exception):
    """The steps of a processor cannot be told; the message says why, and the processor itself must be called."""


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Where one image goes."""

    canvas: Size
    """Size of what is resized: the image, or the square that it is laid on."""
    corner: tuple[int, int]
    """(top, left) of the image on it."""
    resized: Size
    window: tuple[int, int, int, int]
    """(top, left, height, width) of the output in the resized image; beyond it there is level 0."""


@dataclass(frozen=True, kw_only=True)
class ImagePlan:
    """The steps of one image processor; none of them depends on another image of the batch."""

    backend: Literal["pillow", "torchvision"]
    """Which library resizes."""
    resample: int
    """Pillow's number of the filter; antialiasing is always on in both backends of transformers 5."""
    resized: Callable[[int, int], Size]
    """(height, width) before the resize → after it. Raises ValueError as the processor does."""
    background: tuple[int, int, int] | None
    """Colour of the square that an image is laid on before the resize; None: it is not."""
    crop: Size | None
    patches: Patches | None
    """How pixel_values are cut; None: they are [3, height, width]."""

    @property
    def mode(self) -> Mode:
        """Whose integers a resize gives, on this machine."""
        if self.backend == "torchvision":
            return "torchvision"
        return "pillow13" if int(PIL.__version__.split(".")[0]) >= 13 else "pillow12"

    @property
    def filter(self) -> Filter | None:
        """The filter as the kernels name it, None if they have none such."""
        return FILTER_NAMES.get(self.resample)

    def geometry(self, height: int, width: int) -> Geometry:
        """Return where an image of this size goes.

        Raises ValueError, in the processor's words, for one that the processor refuses.
        """
        canvas, corner = (height, width), (0, 0)
        if self.background is not None:
            side = max(height, width)
            canvas, corner = (side, side), ((side - height) // 2, (side - width) // 2)
        resized = self.resized(*canvas)
        if min(resized) < 1:
            raise ValueError(f"an image of {height}×{width} pixels would be resized to {resized}")
        window = (0, 0, *resized)
        if self.crop is not None:
            starts = [self._crop_start(n, cut) for n, cut in zip(resized, self.crop, strict=True)]
            window = (starts[0], starts[1], *self.crop)
        return Geometry(canvas=canvas, corner=corner, resized=resized, window=window)

    def _crop_start(self, n_pixels: int, n_cropped: int) -> int:
        """Where a centre crop begins; negative if it pads, and then the backends round differently.

        Sources: `TorchvisionBackend.center_crop`, `image_transforms.center_crop`.
        """
        if n_pixels < n_cropped and self.backend == "torchvision":
            return -((n_cropped - n_pixels) // 2)
        return (n_pixels - n_cropped) // 2


def derive_plan(image_processor: Any) -> ImagePlan:
    """Read the plan off a transformers 5 image processor. Raises NoPlanError with the reason if it cannot be."""
    try:
        from transformers.image_processing_backends import PilBackend, TorchvisionBackend
    except ImportError as error:
        raise NoPlanError(f"this transformers has no image processing backends ({error})") from error
    kind = type(image_processor)
    if isinstance(image_processor, TorchvisionBackend):
        return _derive(image_processor, "torchvision", TorchvisionBackend)
    if isinstance(image_processor, PilBackend):
        return _derive(image_processor, "pillow", PilBackend)
    raise NoPlanError(f"{kind.__name__} is built on neither of transformers' image backends")


def _derive(processor: Any, backend: Literal["pillow", "torchvision"], base: type) -> ImagePlan:
    kind, steps = type(processor), _defining_class(type(processor), "_preprocess")
    shape = _KINDS.get(steps.__name__.removesuffix("Pil")) if steps is not base else "plain"
    if shape is None or not steps.__module__.startswith("transformers."):
        raise NoPlanError(f"{kind.__name__} has steps of its own ({steps.__name__}._preprocess)")
    for name in _STEPS:
        known = [getattr(owner, name, None) for owner in (base, steps)]
        if getattr(kind, name, None) not in known:
            raise NoPlanError(f"{kind.__name__} has a {name} of its own")
    if shape == "plain" and getattr(processor, "do_pad", None):
        raise NoPlanError(f"{kind.__name__} pads to the largest image of a batch")
    square = shape == "square" and bool(processor.do_pad)
    return ImagePlan(
        backend=backend,
        resample=_resample(processor.resample),
        resized=_size_rule(processor, shape),
        background=_color(processor) if square else None,
        crop=_crop(processor) if shape != "patches" else None,
        patches=_patches(processor) if shape == "patches" else None,
    )


_KINDS = {"LlavaImageProcessor": "square", "Qwen2VLImageProcessor": "patches"}
"""Classes of transformers, less `Pil`, whose `_preprocess` differs from their backend's, and how."""


_STEPS = (
    *("process_image", "_prepare_image_like_inputs", "_preprocess_image_like_inputs", "pad_to_square"),
    *("resize", "center_crop", "rescale", "normalize", "rescale_and_normalize", "patchify"),
)
"""Methods that a plan stands for."""


def _defining_class(kind: type, name: str) -> type:
    return next(owner for owner in kind.__mro__ if name in vars(owner))


def _resample(value: Any) -> int:
    """Return Pillow's number of a filter that is given in either library's way."""
    if value is None:
        return 2  # both backends then take bilinear
    if isinstance(value, int):
        return int(value)
    from transformers.image_utils import torch_pil_interpolation_mapping

    return int(torch_pil_interpolation_mapping[value])


def _color(processor: Any) -> tuple[int, int, int]:
    mean = processor.image_mean
    if not isinstance(mean, Sequence) or len(mean) != 3:
        raise NoPlanError(f"{type(processor).__name__} pads with the colour {mean}, which is no RGB")
    red, green, blue = (int(value * 255) for value in mean)
    return red, green, blue


def _crop(processor: Any) -> Size | None:
    if not processor.do_center_crop:
        return None
    size = processor.crop_size
    if size is None or not (size.height and size.width):
        raise NoPlanError(f"{type(processor).__name__} crops to {size}, which names no height and width")
    return int(size.height), int(size.width)


def _patches(processor: Any) -> Patches:
    return Patches(
        patch=int(processor.patch_size),
        merge=int(processor.merge_size),
        frames=int(processor.temporal_patch_size),
    )


def _size_rule(processor: Any, shape: str) -> Callable[[int, int], Size]:
    """Return (height, width) → size after the resize, by transformers' own functions."""
    size = processor.size
    if not processor.do_resize:
        return lambda height, width: (height, width)
    if shape == "patches":
        return _smart_rule(processor)
    if size.shortest_edge and size.longest_edge:
        return _aspect_rule(size.shortest_edge, size.longest_edge)
    if size.shortest_edge:
        return _shortest_rule(size.shortest_edge)
    if size.max_height and size.max_width:
        return _within_rule(size.max_height, size.max_width)
    if size.height and size.width:
        return lambda height, width: (size.height, size.width)
    raise NoPlanError(f"{type(processor).__name__} resizes to {size}, a rule that is not known")


def _smart_rule(processor: Any) -> Callable[[int, int], Size]:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    size = processor.size
    options = {"factor": processor.patch_size * processor.merge_size}
    options |= {"min_pixels": size.shortest_edge, "max_pixels": size.longest_edge}
    return lambda height, width: _pair(smart_resize(height, width, **options))


def _aspect_rule(shortest: int, longest: int) -> Callable[[int, int], Size]:
    from transformers.image_transforms import get_size_with_aspect_ratio

    return lambda height, width: _pair(get_size_with_aspect_ratio((height, width), shortest, longest))


def _within_rule(max_height: int, max_width: int) -> Callable[[int, int], Size]:
    from transformers.image_utils import get_image_size_for_max_height_width

    return lambda height, width: _pair(
        get_image_size_for_max_height_width((height, width), max_height, max_width)
    )


def _shortest_rule(shortest: int) -> Callable[[int, int], Size]:
    def resized(height: int, width: int) -> Size:
        # `get_resize_output_image_size`, which wants an array to measure
        longer = int(shortest * max(height, width) / min(height, width))
        return (longer, shortest) if width <= height else (shortest, longer)

    return resized


def _pair(size: Any) -> Size:
    return int(size[0]), int(size[1])
