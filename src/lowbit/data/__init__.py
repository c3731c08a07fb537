"""Data sets for the built-in suites, folders of pictures and NumPy files."""

from lowbit.data.augment import flip, pad_crop
from lowbit.data.image_data import ImageData, Split, TensorImages
from lowbit.data.images import Preprocessing
from lowbit.data.loading import SUITES, DataSuite, load_data, loader
from lowbit.data.upscaling import UPSCALING_SUITES, UpscalingData, load_pairs

__all__ = [
    "SUITES",
    "UPSCALING_SUITES",
    "DataSuite",
    "ImageData",
    "Preprocessing",
    "Split",
    "TensorImages",
    "UpscalingData",
    "flip",
    "load_data",
    "load_pairs",
    "loader",
    "pad_crop",
]
