"""The INT8 GEMM of a user of CUTLASS, as a peer: the tiles of ``bench/reference`` on torch tensors.

They lie in ``libfastq_reference.so`` (``-DFASTQ_BENCH=ON`` in a build for 90a), which is looked for
in ``FASTQ_REFERENCE_LIB`` and then under ``build/``.
"""

from __future__ import annotations

import ctypes
import os
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch

LIBRARY = "libfastq_reference.so"
REPOSITORY = Path(__file__).resolve().parents[1]

# The groups of tiles: those of vLLM's dispatcher, larger ones of the same kind, and other ways to
# share out the work.
DISPATCHED, LARGER, BEYOND = "dispatched", "larger", "beyond"


def dispatched_tile(M: int, N: int) -> str:
    """The tile that vLLM's dispatcher for INT8 on sm_90 takes; K plays no part."""
    if M <= 32:
        return "64x64x256_warpspecialized_1x8" if N < 8192 else "64x128x256_warpspecialized_1x4"
    if M <= 64:
        return "64x64x256_warpspecialized_1x1"
    if M <= 128:
        return "64x128x128_pingpong_2x1"
    return "128x128x128_pingpong_2x1"


class Tile(NamedTuple):
    index: int
    name: str  # tile MxNxK, schedule, cluster MxN
    group: str

    @property
    def rows(self) -> int:
        return int(self.name.split("x", 1)[0])

    @property
    def implementation(self) -> str:
        """What it is called in a result."""
        return f"{'beyond' if self.group == BEYOND else 'reference'}[{self.name}]"


class Reference:
    """The shared library."""

    def __init__(self, path: Path):
        self.path = path
        self._library = library = ctypes.CDLL(str(path))
        pointer, size, index = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        library.reference_int8_gemm_name.restype = ctypes.c_char_p
        library.reference_int8_gemm_group.restype = ctypes.c_char_p
        library.reference_int8_gemm_error.restype = ctypes.c_char_p
        library.reference_int8_gemm_workspace_size.argtypes = [index] * 4
        library.reference_int8_gemm_workspace_size.restype = size
        library.reference_int8_gemm.argtypes = [
            index, *[pointer] * 5, *[index] * 3, pointer, size, pointer,
        ]  # fmt: skip

    @cached_property
    def tiles(self) -> list[Tile]:
        library = self._library
        return [
            Tile(
                i,
                library.reference_int8_gemm_name(i).decode(),
                library.reference_int8_gemm_group(i).decode(),
            )
            for i in range(library.reference_int8_gemm_count())
        ]

    def workspace(self, tile: Tile, M: int, N: int, K: int, device: torch.device) -> torch.Tensor:
        size = self._library.reference_int8_gemm_workspace_size(tile.index, M, N, K)
        return torch.empty(size, dtype=torch.uint8, device=device)

    def int8_gemm(
        self,
        tile: Tile,
        a: torch.Tensor,
        b: torch.Tensor,
        sa: torch.Tensor,
        sb: torch.Tensor,
        *,
        out: torch.Tensor,
        workspace: torch.Tensor,
    ) -> None:
        """``fastq.int8_gemm(a, b, sa, sb, out=out)`` by a reference tile, on the current stream.

        Args:
            a, b: int8 ``(M, K)`` contiguous, ``(K, N)`` with K contiguous.
            sa, sb: float32, M and N of them.
            out: bfloat16 ``(M, N)`` contiguous.
            workspace: as :meth:`workspace` gives it.

        Raises:
            RuntimeError: the tile does not take this shape, or the launch failed.
        """
        (M, K), N = a.shape, b.shape[1]
        assert a.is_contiguous()
        assert b.t().is_contiguous()
        assert out.is_contiguous()
        code = self._library.reference_int8_gemm(
            tile.index,
            a.data_ptr(),
            b.data_ptr(),
            sa.data_ptr(),
            sb.data_ptr(),
            out.data_ptr(),
            M,
            N,
            K,
            workspace.data_ptr(),
            workspace.nbytes,
            torch.cuda.current_stream(a.device).cuda_stream,
        )
        if code != 0:
            error = self._library.reference_int8_gemm_error(code).decode()
            raise RuntimeError(f"{tile.name} on M={M}, N={N}, K={K}: {error}")


def find() -> Reference | None:
    """The library, or None with the reason on the standard output."""
    named = os.environ.get("FASTQ_REFERENCE_LIB")
    found = [Path(named)] if named else sorted(REPOSITORY.glob(f"build/**/{LIBRARY}"))
    if not found:
        print(
            f"no reference tiles: there is no {LIBRARY} under {REPOSITORY / 'build'}, and "
            f"FASTQ_REFERENCE_LIB is not set"
        )
        return None
    return Reference(max(found, key=lambda path: path.stat().st_mtime))
