"""Weights that are mapped from their file: let go of what was read of them, page by page, and not
only all at the end.

What a process has read of a mapped file counts as its memory for as long as the mapping stands, and
one tensor that is still in use keeps the mapping of the whole file. A model that is converted while
it is loaded would be in memory twice.
"""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

MAPS = Path("/proc/self/maps")


def drop_pages(tensor: torch.Tensor) -> bool:
    """Takes the whole pages of ``tensor`` out of this process's memory, if they are mapped from a
    file; says whether it did.

    The file's content stays in the system's cache, and who reads the tensor again gets what is in
    the file; so this is for weights that nobody has changed since they were loaded. A tensor that
    is not mapped from a file is left alone, and so is every tensor on a system without /proc.
    """
    storage = tensor.untyped_storage()
    begin = -(-storage.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (storage.data_ptr() + storage.nbytes()) // mmap.PAGESIZE * mmap.PAGESIZE
    if begin >= end or not _is_of_a_file(begin, end):
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    return (
        libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED) == 0
    )


def _is_of_a_file(begin: int, end: int) -> bool:
    """Whether these addresses lie in one mapping of a file."""
    if not MAPS.is_file():
        return False
    for line in MAPS.read_text().splitlines():
        addresses, _, _, _, inode = line.split()[:5]
        low, high = (int(part, 16) for part in addresses.split("-"))
        if low <= begin and end <= high:
            return inode != "0"
    return False
