"""In-memory stand-ins for the conversion tests."""

import numpy as np


class DictReader:
    """Reader over a dict of arrays; counts reads."""

    def __init__(self, tensors: dict[str, np.ndarray]):
        self.tensors = tensors
        self.reads: list[str] = []

    def names(self):
        return self.tensors.keys()

    def shape(self, key):
        return self.tensors[key].shape

    def dtype(self, key):
        return self.tensors[key].dtype

    def read(self, key):
        self.reads.append(key)
        return self.tensors[key]
