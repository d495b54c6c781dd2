"""How the model is run changes no value: recomputed activations, compiled blocks, captions of no tokens."""

from typing import Any

import pytest
import torch
from torch import Tensor

from train.model.config import ComputeConfig
from train.model.dit import DiT, DiTConfig

CONFIG: dict[str, Any] = {
    "hidden_size": 32, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8, "mlp_size": 48, "in_channels": 4,
    "out_channels": 4, "text_width": 12, "pos_embed_max_size": 8,
}  # fmt: skip


def model(**changes: Any) -> DiT:
    net = DiT(DiTConfig.model_validate({**CONFIG, **changes}))
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0, 0.2, generator=g)
    return net


def inputs(lengths: list[int]) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(sum(lengths))
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    latents = torch.randn(len(lengths), 4, 8, 8, generator=g)
    tokens = torch.randn(sum(lengths), 12, generator=g)
    return latents, torch.linspace(20, 900, len(lengths)), tokens, ends


def values(dit: DiT, *batches: list[int]) -> list[Tensor]:
    """Outputs and gradients of several batches."""
    result = []
    for lengths in batches:
        out = dit(*inputs(lengths))
        dit.zero_grad()
        out.square().mean().backward()
        result += [out.detach(), *(p.grad for p in dit.parameters() if p.grad is not None)]
    return result


@pytest.mark.parametrize("attention", ["self", "cross"])
@pytest.mark.parametrize("autocast", [False, True])
def test_recomputing_gives_the_same_bits(attention: str, autocast: bool) -> None:
    eager, again = model(attention=attention), model(attention=attention)
    again.prepare(ComputeConfig(recompute=True))
    assert again.state_dict().keys() == eager.state_dict().keys()
    saved: list[int] = []
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for dit in (eager, again):
            with torch.autograd.graph.saved_tensors_hooks(
                lambda t: saved.append(t.nbytes) or t, lambda t: t
            ):
                saved.append(0)
                dit(*inputs([3, 1]))
        result, expected = values(again, [3, 1]), values(eager, [3, 1])
    middle = len(saved) - saved[::-1].index(0) - 1
    assert sum(saved[middle:]) < 0.5 * sum(saved[:middle])  # the blocks keep nothing
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


@pytest.mark.parametrize("attention", ["self", "cross"])
def test_captions_without_tokens(attention: str) -> None:
    dit = model(attention=attention)
    for lengths in ([0, 0], [0, 3]):
        out = dit(*inputs(lengths))
        out.square().mean().backward()
        grads = [p.grad for p in dit.parameters()]
        assert all(g is not None and g.isfinite().all() for g in grads)
        assert out.isfinite().all()
    latents, timestep, tokens, ends = inputs([0, 3])
    alone = dit(latents[:1], timestep[:1], tokens[:0], ends[:2])
    torch.testing.assert_close(alone, out[:1], atol=2e-5, rtol=0)
    padded = dit(latents[:1], timestep[:1], torch.zeros(1, 0, 12), torch.zeros(1, 0))
    torch.testing.assert_close(padded, alone, atol=2e-5, rtol=0)


def test_tokens_may_be_bf16_as_columns_hold_them() -> None:
    latents, timestep, tokens, ends = inputs([3, 1])
    dit = model()
    out = dit(latents, timestep, tokens.bfloat16(), ends)
    assert torch.equal(out, dit(latents, timestep, tokens.bfloat16().float(), ends))


def test_forward_on_the_meta_device() -> None:
    """What counting FLOPs needs: no memory, only the lengths."""
    with torch.device("meta"):
        dit = DiT(DiTConfig.model_validate(CONFIG))
    latents, timestep, tokens, ends = inputs([3, 1])
    out = dit(latents.to("meta"), timestep.to("meta"), tokens.to("meta"), ends)
    assert (out.shape, out.device.type) == (latents.shape, "meta")


@pytest.mark.slow
def test_compiled_blocks_compute_the_same() -> None:
    """With recomputing, which is the harder case: the compiled block is then called in the backward pass too."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    eager, compiled = model(layers=3), model(layers=3)
    compiled.prepare(ComputeConfig(compile=True, recompute=True))
    assert compiled.state_dict().keys() == eager.state_dict().keys()
    batches = [3, 1], [5, 2], [4, 4], [1, 9]  # another number of tokens each time
    result, expected = values(compiled, *batches), values(eager, *batches)
    for a, b in zip(result, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    frames = torch._dynamo.utils.counters["frames"]
    # one block's code serves all blocks: for the first lengths, for any lengths, and for equal ones
    assert dict(frames) == {"total": 3, "ok": 3}
