"""From the activations of a layer to its feature matrix: samples are rows, features are columns."""

import math
from typing import Literal

from torch import Tensor

FeatureLayout = Literal["positions", "flatten"]


def as_feature_matrix(
    activations: Tensor, *, conv: FeatureLayout = "positions", channel_dim: int | None = None
) -> Tensor:
    """Arrange activations of any shape as a matrix with one row per sample.

    Two layouts are in use for activations that have positions (pixels, tokens), and their ranks cannot be compared:

    - ``"positions"``: every position of every sample is a row and every channel a feature, ``(N * positions, C)``.
    - ``"flatten"``: every sample is a row and every (channel, position) a feature, ``(N, C * positions)``, as the code
      of Prakash et al. 2026 (arXiv 2509.22335) does between its convolutional and its fully connected layers.

    Matrices are returned as they are. The order of the columns of a flattened layout is that of the memory.

    Args:
        activations: ``(N, D)``, or ``(N, ...)`` with channels at ``channel_dim``; the first dimension is the samples.
        conv: The layout, see above.
        channel_dim: Dimension of the channels. By default the last one of three, ``(N, T, C)``, and dimension 1 of
            four or five, ``(N, C, H, W)``. Pass 1 for one-dimensional convolutions, -1 for channels-last images.

    Returns:
        ``(M, D)``, a view where possible, in the dtype of the input.

    Raises:
        ValueError: If ``conv`` is unknown, if there are fewer than two dimensions, or if ``channel_dim`` is not one of
            the dimensions behind the first or is needed and not given.

    Example:
        >>> import torch
        >>> images = torch.zeros(8, 3, 5, 5)
        >>> as_feature_matrix(images).shape
        torch.Size([200, 3])
        >>> as_feature_matrix(images, conv="flatten").shape
        torch.Size([8, 75])
    """
    if conv not in ("positions", "flatten"):
        raise ValueError(f"conv={conv!r} is unknown; expected 'positions' or 'flatten'.")
    shape = tuple(activations.shape)
    if len(shape) < 2:
        raise ValueError(
            f"Activations of shape {shape} have no feature dimension; expected (N, D) or (N, ...). "
            "For a single sample add the sample dimension with activations.unsqueeze(0)."
        )
    channels = _channel_dim(shape, channel_dim) if conv == "positions" else 1
    if len(shape) == 2:
        return activations
    # Sizes are spelt out because reshape cannot infer a -1 when an empty batch makes the number of elements zero.
    if conv == "flatten":
        return activations.reshape(shape[0], math.prod(shape[1:]))
    rows = math.prod(size for dim, size in enumerate(shape) if dim != channels)
    return activations.movedim(channels, -1).reshape(rows, shape[channels])


def _channel_dim(shape: tuple[int, ...], channel_dim: int | None) -> int:
    """The channel dimension as a positive index."""
    ndim = len(shape)
    if channel_dim is None:
        if ndim > 5:
            raise ValueError(
                f"The channel dimension of activations of shape {shape} is ambiguous; "
                "pass channel_dim, or conv='flatten' to take every entry of a sample as a feature."
            )
        return ndim - 1 if ndim <= 3 else 1
    channels = channel_dim + ndim if channel_dim < 0 else channel_dim
    if not 1 <= channels < ndim:
        raise ValueError(
            f"channel_dim={channel_dim} does not fit activations of shape {shape}; expected a dimension from 1 to "
            f"{ndim - 1} or a negative one, never dimension 0, which holds the samples."
        )
    return channels


def check_feature_matrix(matrix: Tensor) -> None:
    """Refuse what is not a non-empty floating point matrix.

    Args:
        matrix: ``(N, D)``, N samples of D features.

    Raises:
        TypeError: If the entries are not real floating point numbers.
        ValueError: If there are not two dimensions, or no samples, or no features.

    Example:
        >>> import torch
        >>> check_feature_matrix(torch.zeros(3))
        Traceback (most recent call last):
            ...
        ValueError: Received a tensor of shape (3,); expected a matrix (N, D). Use as_feature_matrix to make one.
    """
    if not matrix.is_floating_point():
        raise TypeError(f"Received a tensor of {matrix.dtype}; expected floating point. Convert it with .float().")
    if matrix.ndim != 2:
        raise ValueError(
            f"Received a tensor of shape {tuple(matrix.shape)}; expected a matrix (N, D). "
            "Use as_feature_matrix to make one."
        )
    if matrix.numel() == 0:
        raise ValueError(
            f"Received an empty matrix of shape {tuple(matrix.shape)}; expected at least one sample and one feature. "
            "Skip empty batches."
        )
