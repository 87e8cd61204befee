"""Rotary positions, interleaved: columns 2i and 2i+1 of a head are one complex number.

Hugging Face's Llama 4 q and k projections are not permuted for the half-rotation form, so this is
the native one.
Legend: T tokens, H heads, C = head_dim columns.
"""

import math

import torch

from checkpoint.config import ModelConfig, RopeScaling


def rope_frequencies(config: ModelConfig) -> torch.Tensor:
    """Radians per position of each column pair, fp32 [C / 2]: theta^(-2i/C), scaled if the config
    says so."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    return frequencies if config.rope_scaling is None else _scale(frequencies, config.rope_scaling)


def _scale(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    # llama3 scaling: long waves are slowed by `factor`, short ones kept, those between blended.
    # Released Scout has low == high, where nothing lies between and the blend would divide by
    # zero.
    wavelengths = 2 * math.pi / frequencies
    longest_kept = scaling.original_positions / scaling.high_freq_factor
    shortest_slowed = scaling.original_positions / scaling.low_freq_factor
    slowed = torch.where(wavelengths > shortest_slowed, frequencies / scaling.factor, frequencies)
    if scaling.high_freq_factor == scaling.low_freq_factor:
        return slowed
    blend = (scaling.original_positions / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blended = (1 - blend) * frequencies / scaling.factor + blend * frequencies
    is_between = (wavelengths >= longest_kept) & (wavelengths <= shortest_slowed)
    return torch.where(is_between, blended, slowed)


def rotations(frequencies: torch.Tensor, position_T: torch.Tensor) -> torch.Tensor:
    """complex64 [T, C / 2]: the unit numbers that turn each pair at each absolute position."""
    angles = position_T[:, None].float() * frequencies
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x_THC: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Turn every head's pairs by `rotation` (from `rotations`); computed in fp32, returned in x's
    dtype."""
    pairs = torch.view_as_complex(x_THC.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation[:, None, :]).flatten(-2).type_as(x_THC)
