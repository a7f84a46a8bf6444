"""Images in memory as small JPEGs."""

import numpy as np


class Jpegs:
    """A list of JPEGs (bytes or uint8 arrays) of one size [height, width], in an eighth of the memory.

    They read like the array uint8 [n, height, width, 3] RGB: `shape`, `len`, an image by its number.
    """

    def __init__(self, jpegs, size):
        self._data = np.concatenate([np.frombuffer(jpeg, np.uint8) for jpeg in [b"", *jpegs]])
        self._ends = np.cumsum([len(jpeg) for jpeg in jpegs], dtype=int)
        self.shape = (len(jpegs), *size, 3)

    def __len__(self):
        return len(self._ends)

    def __getitem__(self, number):
        import simplejpeg  # here, so that every node can take a batch out of the object store

        return simplejpeg.decode_jpeg(self.jpeg(number), "RGB")

    def jpeg(self, number):
        """An image as it is stored: a view, uint8 [bytes]."""
        return self._data[self._ends[number - 1] if number else 0 : self._ends[number]]
