"""Codes of 1 to 8 bits <-> bytes.

Each row is a little-endian bit stream: code i occupies bits [i*b, (i+1)*b), least significant first, and a row
ends on a byte boundary. 8 codes of b bits are exactly b bytes, so a row of I codes takes ceil(I*b/8) bytes.
Runs on the host: some accelerators lack a right shift.
"""

from __future__ import annotations

import torch
from torch import Tensor


def packed_columns(num_codes: int, bits: int) -> int:
    """Bytes of one packed row."""
    return -(-num_codes * bits // 8)


def pack(codes_RC: Tensor, bits: int) -> Tensor:
    """Pack rows of codes.

    Args:
        codes_RC: uint8 [rows, columns], every value below 2**bits.
    Returns:
        uint8 [rows, ceil(columns*bits/8)].
    """
    codes_RC = codes_RC.cpu()
    rows, columns = codes_RC.shape
    if bits == 8:
        return codes_RC.contiguous()
    padded = torch.nn.functional.pad(codes_RC, (0, -columns % 8)).reshape(rows, -1, 8)
    words = torch.zeros(padded.shape[:2], dtype=torch.int64)
    for position in range(8):
        words |= padded[:, :, position].to(torch.int64) << (position * bits)
    stream = words.view(torch.uint8).reshape(rows, -1, 8)[:, :, :bits].reshape(rows, -1)
    return stream[:, : packed_columns(columns, bits)].contiguous()


def unpack(packed_RB: Tensor, bits: int, num_codes: int) -> Tensor:
    """Undo `pack`: uint8 [rows, bytes] -> uint8 [rows, num_codes]."""
    if bits == 8:
        return packed_RB[:, :num_codes].contiguous()
    rows = packed_RB.shape[0]
    octets = -(-num_codes // 8)
    stream = torch.nn.functional.pad(packed_RB, (0, octets * bits - packed_RB.shape[1])).reshape(rows, octets, bits)
    words = torch.nn.functional.pad(stream, (0, 8 - bits)).contiguous().view(torch.int64).reshape(rows, octets)
    mask = 2**bits - 1
    codes = torch.empty((rows, octets, 8), dtype=torch.uint8)
    for position in range(8):
        codes[:, :, position] = ((words >> (position * bits)) & mask).to(torch.uint8)
    return codes.reshape(rows, -1)[:, :num_codes].contiguous()
