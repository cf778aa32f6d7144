"""The integers that describe one image of a batch to a kernel: the columns of `ragged.Ragged.images`, by name.

It knows nothing about how they are computed.
"""

from __future__ import annotations

from mmextract.kernels.triton_support import constant

SOURCE = constant(0)  # byte offset of the image in the packed pixels
HEIGHT = constant(1)  # of the source, in pixels
WIDTH = constant(2)
LINE_START = constant(3)  # first row (column) of the source that the first pass keeps, if it runs along x (y)
N_LINES = constant(4)  # and how many of them: what the second pass sums over
FIRST_TABLE = constant(5)  # offset of the first pass's table in the packed tables
FIRST_TAPS = constant(6)
FIRST_BITS = constant(7)
FIRST_OUT = constant(8)  # outputs of the first pass along its axis that the output window shows
SECOND_TABLE = constant(9)
SECOND_TAPS = constant(10)
SECOND_BITS = constant(11)
SECOND_OUT = constant(12)
MIDDLE = constant(13)  # byte offset of the image in the buffer between the passes
TOP = constant(14)  # row of the output at which the picture begins; above it there is padding
LEFT = constant(15)
OUT = constant(16)  # the image's output begins at this pixel of all outputs
OUT_HEIGHT = constant(17)
OUT_WIDTH = constant(18)
MASK = constant(19)  # byte offset of the watermark's mask in the packed masks
MASK_HEIGHT = constant(20)  # 0 without a watermark
MASK_WIDTH = constant(21)
MASK_X = constant(22)  # column of the source where the mask's left edge falls
MASK_Y = constant(23)
COLOR = constant(24)  # red + 256·green + 65536·blue
OPACITY = constant(25)
BACKGROUND = constant(26)  # colour of the canvas around the source, like COLOR
N_FIELDS = constant(27)

NAMES = tuple(name.lower() for name in list(globals()) if name.isupper())[:-1]
"""In the order of their columns."""

TABLE_HEAD = constant(3)
"""Numbers before the weights in a packed table's row: first source pixel, sum of the weights, outside weight."""
