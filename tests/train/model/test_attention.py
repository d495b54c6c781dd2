"""Attention over keys of different number: each backend against each sample computed alone, and against a mask."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from configs import ConfigError
from train.model.attention import attend, flex_kernel, varlen_kernel
from train.model.config import Backend

LENGTHS = ([3, 1, 7], [5, 5, 5], [0, 4, 1], [0, 0, 0], [200, 128, 131])


def sample(
    lengths: list[int], heads: int = 4, kv_heads: int = 2, width: int = 16, queries: int = 6
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(len(lengths) + sum(lengths))
    q = torch.randn(len(lengths), queries, heads, width, generator=g)
    k, v = torch.randn(2, sum(lengths), kv_heads, width, generator=g)
    return q, k, v, torch.tensor([0, *lengths]).cumsum(0).int()


def one_by_one(q: Tensor, k: Tensor, v: Tensor, ends: Tensor) -> Tensor:
    """Softmax over the keys of each sample alone, written out; zeros where there are none."""
    groups = q.shape[2] // k.shape[1]
    result = []
    for queries, (start, stop) in zip(q, pairwise(ends.tolist()), strict=True):
        heads = []
        for head in range(q.shape[2]):
            scores = queries[:, head] @ k[start:stop, head // groups].T / q.shape[3] ** 0.5
            heads.append(scores.softmax(1) @ v[start:stop, head // groups])
        result.append(torch.stack(heads, 1))
    return torch.stack(result)


def masked(q: Tensor, k: Tensor, v: Tensor, ends: Tensor) -> Tensor:
    """What was done before: padded keys, repeated for every head, and a dense mask."""
    lengths, groups = ends.diff(), q.shape[2] // k.shape[1]
    real = torch.arange(int(lengths.max())) < lengths[:, None]
    dense_k, dense_v = (x.new_zeros(*real.shape, *x.shape[1:]) for x in (k, v))
    dense_k[real], dense_v[real] = k, v
    dense_k, dense_v = (x.repeat_interleave(groups, 2).transpose(1, 2) for x in (dense_k, dense_v))
    mask = real[:, None, None].expand(-1, 1, q.shape[1], -1)
    return F.scaled_dot_product_attention(q.transpose(1, 2), dense_k, dense_v, mask).transpose(1, 2)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("backend", ["auto", "plain", "flex"])
def test_every_sample_sees_its_own_keys(
    lengths: list[int], heads: int, kv_heads: int, backend: Backend
) -> None:
    tensors = sample(lengths, heads, kv_heads)
    with torch.no_grad():
        result = attend(*tensors, backend)
        torch.testing.assert_close(result, one_by_one(*tensors), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("lengths", LENGTHS[:3] + LENGTHS[4:], ids=str)
def test_gradients_are_those_of_the_masked_computation(lengths: list[int]) -> None:
    q, k, v, ends = sample(lengths)
    weight = torch.randn_like(q)
    compare = one_by_one if 0 in lengths else masked  # a mask without a key gives no number
    results = []
    for function in (attend, compare):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = function(*leaves, ends)
        results.append((out, *torch.autograd.grad((out * weight).sum(), leaves)))
    for result, expected in zip(*results, strict=True):
        torch.testing.assert_close(result, expected, atol=5e-6, rtol=1e-5)


def test_without_any_key_gradients_are_zero() -> None:
    q, k, v, ends = sample([0, 0])
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = attend(*leaves, ends)
    assert not out.any()
    grads = torch.autograd.grad(out.sum(), leaves)
    assert all(g.shape == x.shape and not g.any() for g, x in zip(grads, leaves, strict=True))


def test_a_value_that_is_not_finite_stays_in_its_sample() -> None:
    q, k, v, ends = sample([3, 4, 2])
    v[4] = torch.nan
    out = attend(q, k, v, ends)
    assert [bool(row.isfinite().all()) for row in out] == [True, False, True]


def test_bf16_is_computed_in_bf16() -> None:
    tensors = [x.bfloat16() if x.is_floating_point() else x for x in sample([3, 1, 7])]
    out = attend(*tensors)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), one_by_one(*sample([3, 1, 7])), atol=0.03, rtol=0.03)


def test_what_does_not_fit_is_refused() -> None:
    q, k, v, ends = sample([3, 1, 7])
    with pytest.raises(ValueError, match=r"from 0 to 11, expected from 0 to the 10 tokens"):
        attend(q, k[:-1], v[:-1], ends)
    with pytest.raises(ValueError, match="has 4 numbers, expected 3 for 2 samples"):
        attend(q[:2], k, v, ends)
    with pytest.raises(ConfigError, match="expected half precision on a GPU"):
        attend(q, k, v, ends, "varlen")
    with pytest.raises(ConfigError, match="FlexAttention has no gradient"):
        attend(q, k, v, ends, "flex")


@pytest.mark.slow
def test_flex_attention_compiled() -> None:
    """As a GPU would run it, but for the kernel: the compiler makes one for the CPU."""
    flex = flex_kernel(True)
    for lengths in ([3, 1, 7], [200, 128, 131], [90, 260, 10]):
        q, k, v, ends = sample(lengths, width=32, queries=150)
        with torch.no_grad():
            from train.model.attention import locate

            keys = locate(ends, len(k), q, 0, 2, "flex")
            keys = type(keys)(**{**vars(keys), "kernel": flex})
            result = keys.attend(q, keys.join(k, None), keys.join(v, None))
        torch.testing.assert_close(result, one_by_one(q, k, v, ends), atol=5e-6, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"),
    [("flex", torch.float32, 1e-5), ("plain", torch.float32, 1e-5), ("varlen", torch.bfloat16, 0.03)],
)  # fmt: skip
def test_on_a_gpu(
    lengths: list[int], kv_heads: int, backend: Backend, dtype: torch.dtype, tolerance: float
) -> None:
    """Forward and backward; the half-precision kernel against the same rounded inputs in fp32."""
    if backend == "varlen" and varlen_kernel() is None:
        pytest.skip("torch.nn.attention.varlen is not in this torch")
    torch.backends.cuda.matmul.allow_tf32 = False
    q, k, v, ends = sample(lengths, kv_heads=kv_heads, width=64, queries=200)
    weight = torch.randn_like(q)
    results = []
    for on_gpu in (True, False):
        leaves = [x.to(dtype).to("cuda" if on_gpu else "cpu") for x in (q, k, v)]
        leaves = [(x if on_gpu else x.float()).requires_grad_() for x in leaves]
        out = attend(*leaves, ends, backend) if on_gpu else one_by_one(*leaves, ends)
        grads = torch.autograd.grad((out.float() * weight.to(out.device)).sum(), leaves)
        results.append([x.cpu().float() for x in (out, *grads)])
    for result, expected in zip(*results, strict=True):
        # a gradient of a key adds up hundreds of queries, and is that much larger
        scale = max([1.0, *expected.detach().abs().flatten().tolist()])
        torch.testing.assert_close(result, expected, atol=tolerance * scale, rtol=tolerance)
