"""The embedded default: scikit-learn's 1,797 grey images of handwritten digits, 8x8 pixels.

Source: E. Alpaydin and C. Kaynak 1998, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository.
"""

from __future__ import annotations

import numpy as np
import torch

from lowbit.data.image_data import ImageData, Split, TensorImages, tensor_data
from lowbit.errors import missing_extra

TRAIN_SAMPLES = 1197  # the other 600 are the test samples
WHITE = 16  # pixels are 0 to 16
MEAN, STD = (0.3058,), (0.3756,)


def load_digits(split: Split) -> ImageData:
    """The digits, always split the same way; MissingExtraError without scikit-learn."""
    try:
        from sklearn.datasets import load_digits as bundled_digits
    except ImportError as error:
        raise missing_extra("scikit-learn", "data", "the digits data") from error
    bunch = bundled_digits()
    order = np.random.RandomState(0).permutation(len(bunch.target))  # this generator's numbers are frozen for good
    chosen = torch.from_numpy(order[TRAIN_SAMPLES:] if split == "test" else order[:TRAIN_SAMPLES])
    images = torch.from_numpy(bunch.images.astype(np.uint8)).unsqueeze(1)[chosen]
    labels = torch.from_numpy(bunch.target.astype(np.int64))[chosen]
    dataset = TensorImages(images, labels, MEAN, STD, white=WHITE)
    return tensor_data("digits", dataset, 10, "0123456789")
