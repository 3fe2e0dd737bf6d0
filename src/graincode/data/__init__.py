"""Data sets of images and of codes, and the order in which training sees them."""

from graincode.data.codes import CodeBatch, CodeDataset
from graincode.data.fashion_mnist import FashionMNIST
from graincode.data.images import (
    FolderImages,
    ImageBatch,
    ImageDataset,
    ImageFolder,
    ImageSource,
    Subset,
    TensorImages,
)

__all__ = [
    "CodeBatch",
    "CodeDataset",
    "FashionMNIST",
    "FolderImages",
    "ImageBatch",
    "ImageDataset",
    "ImageFolder",
    "ImageSource",
    "Subset",
    "TensorImages",
]
