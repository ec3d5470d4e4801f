"""Read Fashion-MNIST and the test images of MNIST, and download what is missing."""

import gzip
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from encourage_mt.data.download import download
from encourage_mt.environment import DOWNLOADS
from encourage_mt.errors import UserError

CLASSES, SIZE = 10, 28
URLS = (
    "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
)
MD5 = {  # as published on github.com/zalandoresearch/fashion-mnist
    "train-images-idx3-ubyte.gz": "md5:8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte.gz": "md5:25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte.gz": "md5:bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte.gz": "md5:bb300cfdad3c16e7a12a480ee83cd310",
}
DIGITS_URLS = ("https://ossci-datasets.s3.amazonaws.com/mnist/",)
DIGITS, DIGITS_MD5 = "t10k-images-idx3-ubyte.gz", "md5:9fb629c4189551a2d022fa330f9573f3"


def load(raw: Path | None) -> dict[str, Tensor]:
    """Return the images [N, 28, 28] and labels [N] of train and test, all uint8.

    raw: folder with the files of Fashion-MNIST; without it, they are downloaded. Raises UserError if a file is missing
    or damaged.
    """
    data = {}
    for (name, md5), part in zip(MD5.items(), ("images", "labels", "test images", "test labels"), strict=True):
        path = find(name, raw, URLS, md5, DOWNLOADS / "fashion_mnist", "--raw-dir")
        if "images" in part:
            data[part] = read_images(path)
            continue
        labels, size = read(path), len(data[part.replace("labels", "images")])
        if list(labels.shape) != [size] or labels.unique().tolist() != [*range(CLASSES)]:
            raise UserError(f"{path}: must have one label below {CLASSES} for each of {size:,} images, and each label")
        data[part] = labels
    return data


def load_digits(path: Path | None) -> Tensor:
    """Return the test images of MNIST [N, 28, 28] as uint8, from a file or downloaded. Raises UserError as `load`."""
    return read_images(path or find(DIGITS, None, DIGITS_URLS, DIGITS_MD5, DOWNLOADS / "mnist", "--digits"))


def find(name: str, raw: Path | None, urls: tuple[str, ...], checksum: str, folder: Path, option: str) -> Path:
    """Return the path of a file in `raw` or, without it, in `folder`, where it is downloaded to if it is missing.

    option: the one that names a file which the user has.
    """
    path = (raw or folder) / name
    if raw and not path.exists():
        raise UserError(f"{path}: no such file; name the folder that has it with {option}")
    if not path.exists():
        download([url + name for url in urls], path, [checksum], option)
    return path


def read_images(path: Path) -> Tensor:
    images = read(path)
    shape = list(images.shape)
    if shape[1:] != [SIZE, SIZE] or not shape[0] or images.dtype != torch.uint8:
        raise UserError(f"{path}: must have images of {SIZE} x {SIZE} bytes, has the shape {shape}, {images.dtype}")
    return images


def read(path: Path) -> Tensor:
    """Return the bytes of an IDX file (.gz), or `images` of an .npz file. Raises UserError if it is damaged."""
    try:
        if path.suffix == ".npz":
            return torch.from_numpy(np.load(path)["images"])
        content = gzip.decompress(path.read_bytes())
    except (EOFError, LookupError, TypeError, ValueError, zlib.error, gzip.BadGzipFile, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not a complete {path.suffix or '.gz'} file ({error})") from None
    if len(content) < 4 or content[:3] != b"\0\0\x08" or len(content) < 4 + 4 * content[3]:
        raise UserError(f"{path}: not an IDX file of bytes")
    shape = np.frombuffer(content, ">u4", content[3], 4)
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape))
    if len(values) != shape.prod():
        raise UserError(f"{path}: has {len(values):,} values, its header says {shape.prod():,}; get the file again")
    return torch.from_numpy(values.reshape(shape).copy())
