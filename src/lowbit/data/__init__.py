"""Data sets for the built-in suites, folders of pictures and NumPy files."""

from lowbit.data.augment import flip, pad_crop
from lowbit.data.image_data import ImageData, Split, TensorImages
from lowbit.data.images import Preprocessing
from lowbit.data.loading import SUITES, DataSuite, load_data, loader

__all__ = ["SUITES", "DataSuite", "ImageData", "Preprocessing", "Split", "TensorImages", "flip", "load_data", "loader", "pad_crop"]
