"""Data sets of images and of codes, and the order in which training sees them."""

from graincode.data.augmentation import Augmentation
from graincode.data.codes import CodeBatch, CodeDataset
from graincode.data.folders import FFHQ, ImageFolder, ImageNet
from graincode.data.hugging_face import HuggingFace
from graincode.data.images import ImageBatch, ImageDataset, ImageSource, Subset, TensorImages
from graincode.data.published import CIFAR10, FashionMNIST
from graincode.data.webdataset import WebDataset

__all__ = [
    "CIFAR10",
    "FFHQ",
    "Augmentation",
    "CodeBatch",
    "CodeDataset",
    "FashionMNIST",
    "HuggingFace",
    "ImageBatch",
    "ImageDataset",
    "ImageFolder",
    "ImageNet",
    "ImageSource",
    "Subset",
    "TensorImages",
    "WebDataset",
]
