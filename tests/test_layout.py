import pytest
import torch

from lightning_opt._layout import is_dense, overlaps_itself, same_layout, stage


@pytest.mark.parametrize(
    ("tensor", "dense", "overlapping"),
    [
        (torch.zeros(()), True, False),
        (torch.zeros(0, 3), True, False),
        (torch.zeros(4, 3).t(), True, False),
        (torch.zeros(2, 3, 4).permute(1, 2, 0), True, False),
        (torch.zeros(4, 3)[:, :2], False, False),
        (torch.zeros(10)[::3], False, False),
        (torch.zeros(1, 3).expand(4, 3), False, True),
        (torch.zeros(9).as_strided((3, 3), (2, 1)), False, True),
        (torch.zeros(9).unfold(0, 3, 2), False, True),
        (torch.zeros(3).as_strided((3, 1), (1, 0)), True, False),  # the stride of a dimension of one is of no account
    ],
)
def test_which_tensors_are_dense_and_which_overlap_themselves(tensor, dense, overlapping):
    assert is_dense(tensor) == dense
    assert overlaps_itself(tensor) == overlapping


def test_the_layout_of_a_dimension_of_one_is_of_no_account():
    kernel = torch.zeros(8, 4, 1, 1)
    assert same_layout(kernel, kernel.to(memory_format=torch.channels_last))
    assert not same_layout(torch.zeros(3, 4), torch.zeros(4, 3).t())


def test_stage_copies_what_does_not_fit_and_nothing_else():
    fits, sliced = torch.randn(4, 3), torch.randn(4, 5)[:, :3]
    states, grads = [torch.randn(4, 3), torch.randn(3, 4).t()], [torch.randn(3, 4).t(), torch.randn(4, 3)]
    params, [own_states], [own_grads], back = stage([fits, sliced], [states], [grads])
    assert params[0] is fits
    assert own_states[0] is states[0]
    assert own_grads[1] is grads[1]
    assert list(map(id, [target for target, _ in back])) == list(map(id, [sliced, states[1]]))
    originals = [fits, sliced, *states, *grads]
    for staged, original in zip([*params, *own_states, *own_grads], originals, strict=True):
        assert staged.is_contiguous()
        assert torch.equal(staged, original)


def test_stage_keeps_the_order_of_dimensions():
    """So that the states, which are created with it, need no copy."""
    p = torch.randn(6, 4).t()[:, ::2]
    state = torch.zeros_like(p)
    [staged], [[own_state]], _, _ = stage([p], [[state]], [[torch.zeros(4, 3)]])
    assert own_state is state
    assert staged.stride() == state.stride() == (1, 4)


def test_stage_refuses_tensors_of_other_shapes():
    with pytest.raises(ValueError, match=r"shapes differ: \(3, 4\) for a parameter of \(4, 3\)"):
        stage([torch.zeros(3, 4).t()], [], [[torch.zeros(3, 4)]])
