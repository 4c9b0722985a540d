"""Delta log amplitude: how much of the high spatial frequencies is in a layer's output (Figure 3; Park & Kim 2022).

    f_i = mean over images and channels of log( |F_ii| + 1e-6 ),   delta_i = f_i - f_0

F is the two-dimensional discrete Fourier transform of a channel on the m x m grid of patches. On its diagonal F_ii both
axes have the frequency i / m cycles per patch; i = 0 is the mean over patches. The logarithm is taken before averaging.

The last point of the diagonal lies below the highest frequency, pi (a pattern that alternates from patch to patch): for
even m, i runs to m/2 - 1, so on 14 x 14 patches to 6/14 cycles per patch, which is 0.857 pi. The notebook of Park & Kim
computes the same numbers, but labels its axis 0 to 1.0 pi.
"""
import torch


def diagonal_frequencies(grid) -> list[float]:
    """Return the diagonal's frequencies 2 i / m, in units of pi, for a grid (rows, columns); m is the shorter side."""
    m = min(grid)
    return [2 * i / m for i in range(m - m // 2)]


def log_amplitude(tokens: torch.Tensor, grid) -> torch.Tensor:
    """Compute log( |F_ii| + 1e-6 ), averaged over channels: (B, L, C) -> (B, frequencies).

    tokens: patch tokens without prefix tokens, in row-major order on `grid` (rows, columns). If the grid is not square,
    i / m is a frequency of the shorter axis, and the longer axis takes the nearest of its own.
    """
    B, _, C = tokens.shape
    maps = tokens.float().transpose(1, 2).reshape(B, C, *grid)
    steps = torch.arange(len(diagonal_frequencies(grid)), device=tokens.device) / min(grid)
    i, j = ((steps * n).round().long() for n in grid)
    F_ii = torch.fft.fft2(maps)[:, :, i, j]  # (B, C, frequencies)
    return (F_ii.abs() + 1e-6).log().mean(dim=1)


def delta_log_amplitude(f: torch.Tensor) -> torch.Tensor:
    """Compute delta_i = f_i - f_0 from log amplitudes f averaged over images: (..., frequencies) -> the same shape."""
    return f - f[..., :1]
