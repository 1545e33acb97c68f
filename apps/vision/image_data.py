"""``ImageData``: the base of the data of images, of classifiers and of image-text pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from apps.base.checks import check_at_least, check_name
from apps.data.splits import check_size
from apps.data.suite_data import SuiteData
from apps.vision.batch import Augment
from apps.vision.encoding import PixelEncoding, check_images


class ImageData(SuiteData):
    """Images that are scaled as a checkpoint, the options or the dataset say.

    Args:
        dataset: a key of ``datasets``.
        batch_size: training examples per step and process.
        eval_batch_size: examples per step and process in evaluation.
        val_size: images held out for validation, as a count (500) or a share (0.1). 0: no validation. Default: a tenth,
            within limits, if the data have no validation images of their own.
        subset: use only this many training examples, sampled by split_seed after validation is held out.
        split_seed: seed of the held-out images and of the subset, so that runs of other seeds have the same images.
        image_size: scale images to this height and width; default the checkpoint's, else the dataset's own, 224 for
            image files.
        eval_crop: for image files: scale to image_size / eval_crop, keep the center; ImageNet: 0.875. Default: the
            checkpoint's, else 1.
        mean: mean of each channel, pixels in [0, 1], for normalizing; default the checkpoint's, else the dataset's,
            ImageNet's for image files.
        std: standard deviation of each channel, likewise.
        crop_padding: pad training images by this many black pixels, at image_size, and cut at random. 0: off.
        horizontal_flip: mirror training images left to right with probability 1/2. A caption that says "left" is wrong
            then.
        random_resized_crop: cut a box of at least this share of the area at random out of training images and scale it
            up, in (0, 1]; 0.08 is usual on ImageNet. Default: off.
        kwargs: ``root``, ``cache_dir``, ``drop_last``, ``num_workers`` and ``seed`` of ``SuiteData``.

    Raises:
        ValueError: an unknown dataset (with the nearest name), or an option out of its range.
    """

    datasets: ClassVar[Mapping[str, Any]]
    """The datasets by name, each with ``image_size``, ``in_chans``, ``mean`` and ``std``."""

    def __init__(
        self,
        dataset: str,
        *,
        batch_size: int = 128,
        eval_batch_size: int = 256,
        val_size: int | float | None = None,
        subset: int | None = None,
        split_seed: int = 0,
        image_size: int | None = None,
        eval_crop: float | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        crop_padding: int = 0,
        horizontal_flip: bool = False,
        random_resized_crop: float | None = None,
        **kwargs: Any,
    ) -> None:
        check_name("dataset", dataset, sorted(self.datasets))
        super().__init__(dataset, batch_size=batch_size, eval_batch_size=eval_batch_size, **kwargs)
        check_at_least(1, subset=subset)
        check_size("val_size", val_size)
        self._spec = self.datasets[dataset]
        self.val_size, self.subset, self.split_seed = val_size, subset, split_seed
        self._written: dict[str, Any] = {
            "image_size": image_size,
            "mean": None if mean is None else tuple(mean),
            "std": None if std is None else tuple(std),
            "eval_crop": eval_crop,
        }
        self._augment = Augment(crop_padding, horizontal_flip, random_resized_crop)
        PixelEncoding(**self.pixel_fields)  # checks them

    @property
    def pixel_fields(self) -> dict[str, Any]:
        """The fields of a ``PixelEncoding``: the checkpoint's, else from the options and the dataset."""
        if self._adopted is not None:
            return {name: getattr(self._adopted, name) for name in (*self._written, "in_chans")}
        known = {name: getattr(self._spec, name, 1.0) for name in (*self._written, "in_chans")}
        return known | {name: value for name, value in self._written.items() if value is not None}

    @property
    def image_size(self) -> int:
        return int(self.pixel_fields["image_size"])

    @property
    def in_chans(self) -> int:
        return int(self.pixel_fields["in_chans"])

    @property
    def eval_crop(self) -> float:
        return float(self.pixel_fields["eval_crop"])

    def adopt(self, encoding_state: Mapping[str, Any]) -> None:
        """Scale images, and number classes, as a checkpoint says that keeps this ``encoding_state``.

        Raises:
            ValueError: an option that was given says otherwise.
        """
        check_images(self._written, self.encoding_of(encoding_state))
        super().adopt(encoding_state)
