"""Packs a projection's weights as the kernels want them: in panels, bfloat16 or int8."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from services.engine.native.kernels import PANEL_COLUMNS, Epilogue, KernelLibrary, Weights, Workspace

# In int8, sums of unsigned activations (up to 255) times weights (up to 127) must fit 32 bits.
MAX_INT8_DEPTH: Final = 2**31 // (255 * 127)


class Projection:
    """Packed weights, and the call that multiplies by them. The unpacked ones are not kept."""

    def __init__(
        self, library: KernelLibrary, weight: Tensor, bias: Tensor | None, *, int8: bool = False, gated: bool = False
    ) -> None:
        """`weight` bfloat16 `[out, in]`, `bias` `[out]`.

        `gated`: the upper half of the rows is a gate, the lower what it lets through, and they go into the panels in
        turns of 16; to be called with a GATE epilogue, which gives half as many outputs.

        `int8`: each row w becomes scale * q, q from -127 to 127, and each row of x likewise when it comes (W8A8).
        """
        num_rows, depth = weight.shape
        self._library = library
        order = _gated_order(num_rows // 2) if gated else _plain_order(num_rows)
        self.num_outputs = num_rows // 2 if gated else num_rows
        self.weights: Final = Weights(num_columns=order.size, depth=depth, num_outputs=self.num_outputs)
        self._arrays: list[npt.NDArray[np.generic]] = []  # whose addresses `weights` has
        if int8:
            assert depth <= MAX_INT8_DEPTH, depth
            scales = weight.abs().amax(dim=1).float() / 127  # of bfloat16: abs() is exact, and half the memory to write
            rounded = weight.float().div_(scales.clamp(min=1e-30)[:, None]).round_()
            self.weights.scales = self._in_order(scales.numpy(), order)
            self.weights.sums = self._in_order(rounded.sum(dim=1).to(torch.int32).numpy(), order)  # whole, below 2^24
            weight = rounded.to(torch.int8)
        else:
            assert weight.dtype == torch.bfloat16, weight.dtype
        weight = weight.contiguous()
        panels = library.pack(weight.data_ptr(), depth, weight.element_size(), order)
        self.weights.panels = panels.ctypes.data
        self._arrays.append(panels)
        if bias is not None:
            self.weights.bias = self._in_order(bias.float().numpy(), order)

    @property
    def num_bytes(self) -> int:
        """Memory that the packed weights take."""
        return sum(array.nbytes for array in self._arrays)

    def _in_order(self, values: npt.NDArray[np.generic], order: npt.NDArray[np.int64]) -> int:
        """Keep `values` of the rows in the order of packed columns, zeros where there is no row; return the address."""
        ordered = np.where(order >= 0, values[np.maximum(order, 0)], values.dtype.type(0))
        self._arrays.append(ordered)
        return ordered.ctypes.data

    def __call__(self, x: Tensor, y: Tensor, epilogue: Epilogue, workspace: Workspace, num_threads: int) -> None:
        """Multiply `x` `[T, in]`, bfloat16 with contiguous rows, into `y` `[T, num_outputs]`: see `Epilogue`."""
        assert (x.dtype, x.shape[1], x.stride(1)) == (torch.bfloat16, self.weights.depth, 1)
        dtype = torch.float32 if epilogue is Epilogue.WRITE_FLOAT else torch.bfloat16
        assert (y.dtype, *y.shape, y.stride(1)) == (dtype, x.shape[0], self.num_outputs, 1)
        self._library.linear(
            self.weights,
            x.data_ptr(),
            x.stride(0),
            x.shape[0],
            y.data_ptr(),
            y.stride(0),
            epilogue,
            workspace,
            num_threads,
        )


def _plain_order(num_rows: int) -> npt.NDArray[np.int64]:
    """Rows one after the other, -1 for what pads the last panel."""
    order = np.full(-(-num_rows // PANEL_COLUMNS) * PANEL_COLUMNS, -1, dtype=np.int64)
    order[:num_rows] = np.arange(num_rows)
    return order


def _gated_order(num_outputs: int) -> npt.NDArray[np.int64]:
    """Orders rows so that each panel has 16 rows of the gate, then the 16 rows that these gate."""
    half = PANEL_COLUMNS // 2
    panels = np.full((-(-num_outputs // half), 2, half), -1, dtype=np.int64)
    for output in range(num_outputs):
        panels[output // half, :, output % half] = (output, num_outputs + output)
    return panels.reshape(-1)
