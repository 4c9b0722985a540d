"""Delta log amplitude: how much of the high spatial frequencies a layer keeps (Figure 3; Park & Kim 2022).

    f_i = mean over images and channels of log( |F_ii| + 1e-6 ),   delta_i = f_i - f_0

where F is the two-dimensional discrete Fourier transform of a channel on the grid of patches, and F_ii its diagonal, on
which both axes have the frequency i / m cycles per patch; i = 0 is the mean. The logarithm is taken before averaging.

The last point is below the highest frequency, pi (a pattern that alternates from patch to patch). On m x m patches with
m even, i runs to m/2 - 1: on 14 x 14 patches to 6/14 cycles per patch, 0.857 pi. The notebook of Park & Kim computes
the same numbers, but labels its axis 0 to 1.0 pi.
"""
import torch


def diagonal_frequencies(grid) -> list[float]:
    """List the diagonal's frequencies in units of pi for a grid (rows, columns)."""
    m = min(grid)
    return [2 * i / m for i in range(m - m // 2)]


def log_amplitude(tokens: torch.Tensor, grid) -> torch.Tensor:
    """Compute log( |F_ii| + 1e-6 ), averaged over channels: (B, L, C) -> (B, frequencies).

    tokens: patch tokens without prefix tokens, in row-major order on `grid` (rows, columns). If the grid is not square,
    the longer axis takes the nearest of its frequencies to the i / m of the shorter axis.
    """
    B, _, C = tokens.shape
    maps = tokens.float().transpose(1, 2).reshape(B, C, *grid)
    steps = torch.arange(len(diagonal_frequencies(grid)), device=tokens.device) / min(grid)
    i, j = ((steps * n).round().long() for n in grid)
    F_ii = torch.fft.fft2(maps)[:, :, i, j]  # (B, C, frequencies)
    return (F_ii.abs() + 1e-6).log().mean(dim=1)


def delta_log_amplitude(f: torch.Tensor) -> torch.Tensor:
    """Compute delta_i = f_i - f_0 from log amplitudes averaged over images: (..., frequencies) of the same shape."""
    return f - f[..., :1]
