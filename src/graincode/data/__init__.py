"""Data sets of images and of codes, and the order in which training sees them."""

from graincode.data.augmentation import Augmentation as Augmentation
from graincode.data.codes import CodeBatch as CodeBatch
from graincode.data.codes import CodeDataset as CodeDataset
from graincode.data.folders import FFHQ as FFHQ
from graincode.data.folders import ImageFolder as ImageFolder
from graincode.data.folders import ImageNet as ImageNet
from graincode.data.hugging_face import HuggingFace as HuggingFace
from graincode.data.images import ImageBatch as ImageBatch
from graincode.data.images import ImageDataset as ImageDataset
from graincode.data.images import ImageSource as ImageSource
from graincode.data.images import Subset as Subset
from graincode.data.images import TensorImages as TensorImages
from graincode.data.published import CIFAR10 as CIFAR10
from graincode.data.published import FashionMNIST as FashionMNIST
from graincode.data.webdataset import WebDataset as WebDataset
