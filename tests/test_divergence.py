"""Divergences against their definitions, in float64, whatever the chunks, and the memory that they keep."""

import pytest
import torch

from hf_sparse24.divergence import kl_divergence, square_head, squared_error


def definition(student, teacher, kept, temperature=1.0):
    student, teacher = ((logits.double() / temperature).softmax(-1) for logits in (student, teacher))
    divergence = (teacher * (teacher / student).log()).sum(-1)
    return (divergence * kept).sum() * temperature**2


@pytest.fixture
def logits():
    student = torch.randn(2, 5, 11, requires_grad=True)
    return student, torch.randn(2, 5, 11) * 2, torch.rand(2, 5) > 0.3


@pytest.mark.parametrize("chunk_tokens", [1, 3, 10, 1000])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_divergence_and_its_gradient_are_those_of_the_definition(logits, chunk_tokens, temperature):
    student, teacher, kept = logits
    found = kl_divergence(student, teacher, kept, temperature, chunk_tokens=chunk_tokens)
    expected = definition(student, teacher, kept, temperature)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)  # float32 against float64
    (gradient,) = torch.autograd.grad(found, student)
    (wanted,) = torch.autograd.grad(expected, student)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)
    assert (gradient[~kept] == 0).all()


def test_of_the_same_logits_it_is_zero(logits):
    student, _, kept = logits
    assert abs(float(kl_divergence(student, student, kept).detach())) < 1e-6


def test_few_classes_bound_it_from_below_and_all_but_one_give_all_of_it(logits):
    student, teacher, kept = logits
    whole = float(kl_divergence(student, teacher, kept))
    by_count = [float(kl_divergence(student, teacher, kept, top_k=count)) for count in (1, 3, 6, 9)]
    assert by_count == sorted(by_count)
    assert 0 < by_count[-1] < whole * (1 + 1e-5)
    # The classes beyond the ninth are two; as one they tell a little less than apart.
    index = teacher.topk(9).indices
    p, q = teacher.double().softmax(-1), student.double().softmax(-1)
    p, q = ((torch.cat([x.gather(-1, index), 1 - x.gather(-1, index).sum(-1, keepdim=True)], -1)) for x in (p, q))
    expected = ((p * (p / q).log()).sum(-1) * kept).sum()
    assert by_count[-1] == pytest.approx(float(expected), rel=1e-4)
    assert float(kl_divergence(student, teacher, kept, top_k=10)) == whole


def test_nothing_is_kept_for_the_gradient_but_the_logits():
    student = torch.randn(64, 1000, dtype=torch.bfloat16, requires_grad=True)
    teacher = torch.randn(64, 1000, dtype=torch.bfloat16)
    largest, storages = 0, {}

    def look(tensor):
        nonlocal largest
        largest = max(largest, tensor.numel() * tensor.element_size())
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(look, lambda tensor: tensor):
        kl_divergence(student, teacher, torch.ones(64, dtype=torch.bool), chunk_tokens=8).backward()
    assert largest <= 8 * 1000 * 4  # one chunk in float32, while its gradient is made
    inputs = student.nbytes + teacher.nbytes
    assert sum(size for size in storages.values() if size > 8 * 1000 * 4) <= inputs


def test_logits_of_another_vocabulary_are_refused(logits):
    student, teacher, kept = logits
    with pytest.raises(ValueError, match="Use a teacher with the same vocabulary"):
        kl_divergence(student, teacher[..., :7], kept)


def test_square_head_is_the_relative_error_averaged_over_layers():
    student, teacher = ([torch.randn(2, 3, 4) for _ in range(3)] for _ in range(2))
    kept = torch.tensor([[True, True, False], [True, False, False]])
    ratios = [
        (own - other)[kept].square().sum() / other[kept].square().sum()
        for own, other in zip(student, teacher, strict=True)
    ]
    torch.testing.assert_close(square_head(student, teacher, kept), torch.stack(ratios).mean())
    error, size = squared_error(student[0], teacher[0], kept)
    torch.testing.assert_close(error / size, ratios[0])
    with pytest.raises(ValueError, match="3 layers of hidden states, the teacher 2"):
        square_head(student, teacher[:2], kept)
