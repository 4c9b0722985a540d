"""How much a layer keeps of high spatial frequencies: the delta log amplitude (Figure 3; Park & Kim 2022).

    f_i = mean over images and channels of log( |F_ii| + 1e-6 ),   delta_i = f_i - f_0

where F is the two-dimensional Fourier transform of a channel on the grid of patches and F_ii its diagonal, on which
both axes have the frequency i / m cycles per patch; i = 0 is the mean. The logarithm is taken before the mean.

The last point is not the highest frequency. On m x m patches with m even, i runs to m/2 - 1: on 14 x 14 to 6/14 cycles
per patch, 0.857 pi, although the notebook of Park & Kim, whose numbers these are, labels its axis 0 to 1.0 pi.
"""
import torch


def diagonal_frequencies(grid):
    """The diagonal's frequencies in units of pi (1: an alternating pattern): grid (rows, columns) -> list."""
    m = min(grid)
    return [2 * i / m for i in range(m - m // 2)]


def log_amplitude(tokens, grid):
    """Patch tokens (B, L, C), prefix tokens cut off, row by row on `grid` -> mean over channels (B, half diagonal).

    On a grid that is not square the diagonal is that of the frequency plane: where the shorter axis has i / m, the
    longer one has the nearest of its own frequencies.
    """
    B, _, C = tokens.shape
    maps = tokens.float().transpose(1, 2).reshape(B, C, *grid)
    steps = torch.arange(len(diagonal_frequencies(grid)), device=tokens.device) / min(grid)
    i, j = ((steps * n).round().long() for n in grid)
    return (torch.fft.fft2(maps)[:, :, i, j].abs() + 1e-6).log().mean(dim=1)


def delta_log_amplitude(tokens, grid):
    """Patch tokens (B, L, C) -> delta relative to frequency 0, mean over images: (half diagonal,), first entry 0."""
    f = log_amplitude(tokens, grid).double().mean(dim=0)
    return f - f[0]
