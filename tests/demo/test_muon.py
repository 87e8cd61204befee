"""The matrices' optimizer against the singular value decomposition that it approximates."""

import pytest
import torch
from torch import Tensor

from demo.muon import Muon, orthogonalized

SHAPES = {"wide": (24, 64), "tall": (64, 24), "a stack": (3, 20, 48), "a stack of tall ones": (3, 48, 20)}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stepped(weight: Tensor, gradient: Tensor | None, steps: int = 1, **settings: float) -> Tensor:
    """The weight after steps with one gradient."""
    parameter = weight.clone().requires_grad_()
    optimizer = Muon([parameter], **{"lr": 0.1, **settings})
    for _ in range(steps):
        parameter.grad = gradient
        optimizer.step()
    return parameter.detach()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_singular_values_become_nearly_one(shape: tuple[int, ...]) -> None:
    values = torch.linalg.svdvals(orthogonalized(random(*shape)))
    assert values.min() > 0.6
    assert values.max() < 1.3


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_singular_vectors_stay(shape: tuple[int, ...]) -> None:
    matrix = random(*shape)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    nearest = left @ right
    assert (orthogonalized(matrix) - nearest).norm() / nearest.norm() < 0.25


def test_a_stacks_matrices_do_not_mix() -> None:
    stack = random(3, 20, 48) * torch.tensor([1.0, 100.0, 0.01])[:, None, None]
    alone = torch.stack([orthogonalized(matrix) for matrix in stack])
    assert torch.allclose(orthogonalized(stack), alone, atol=0.02)


def test_no_gradient_at_all_is_no_direction() -> None:
    assert orthogonalized(torch.zeros(4, 8)).equal(torch.zeros(4, 8))


def test_a_step_goes_against_the_gradient_as_far_as_adamws_would() -> None:
    """0.2 per element, root mean square, whatever the shape (Liu et al. 2025)."""
    weight, gradient = random(24, 64), random(24, 64, seed=1)
    change = stepped(weight, gradient) - weight
    assert (change * gradient).sum() < 0
    assert change.square().mean().sqrt() == pytest.approx(0.1 * 0.2, rel=0.2)


def test_a_weight_without_a_gradient_stays() -> None:
    assert stepped(random(4, 8), None, weight_decay=0.5).equal(random(4, 8))


def test_at_rate_zero_nothing_changes() -> None:
    assert stepped(random(4, 8), random(4, 8, seed=1), lr=0.0, weight_decay=0.5).equal(random(4, 8))


@pytest.mark.parametrize("scale", [2.0**-10, 2.0**10])
def test_the_gradients_scale_does_not_matter(scale: float) -> None:
    weight, gradient = random(24, 64), random(24, 64, seed=1)
    assert torch.allclose(stepped(weight, scale * gradient, 3), stepped(weight, gradient, 3), atol=1e-3)


def test_momentum_remembers_the_last_gradient() -> None:
    weight, first, second = random(24, 64), random(24, 64, seed=1), random(24, 64, seed=2)
    parameter = weight.clone().requires_grad_()
    optimizer = Muon([parameter], lr=0.1, momentum=0.5)
    for gradient in (first, second):
        before = parameter.detach().clone()
        parameter.grad = gradient
        optimizer.step()
    # The average of the gradients so far, 0.25 first + 0.5 second, and Nesterov's look ahead.
    expected = orthogonalized(0.5 * second + 0.5 * (0.25 * first + 0.5 * second))
    assert torch.allclose(parameter.detach() - before, -0.1 * 0.2 * 64**0.5 * expected, atol=1e-3)


def test_weight_decay_shrinks() -> None:
    weight, gradient = random(4, 8), random(4, 8, seed=1)
    difference = stepped(weight, gradient) - stepped(weight, gradient, weight_decay=0.5)
    assert torch.allclose(difference, 0.1 * 0.5 * weight, atol=1e-6)
