"""The scale operation: as exact as its dtype allows, with an fp32 gradient and no memory of its own."""

import pytest
import torch
from peft import get_peft_model
from torch.testing import assert_close

from models import INPUT_IDS, adapted, base_model, logits, seal_layers
from seal_peft import SealConfig
from seal_peft.tuner.kernels import fits_kernel
from seal_peft.tuner.scale import scale_channels, scale_rows

HEADS, HEAD_DIM = 3, 5
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = pytest.mark.parametrize("shape", [(HEADS, 1), (HEADS, HEAD_DIM)], ids=["head", "channel"])


def scale_heads(x, scale):
    """The operation as the layer calls it: one scale per head is spread over the head's channels first."""
    return scale_channels(x, scale.expand(HEADS, HEAD_DIM).reshape(-1))


def inputs(shape, dtype, tokens=(2, 7)):
    x = torch.randn(*tokens, HEADS * HEAD_DIM).to(dtype)
    return x, 1 + 0.5 * torch.randn(shape)


def reference(x, scale):
    """Plain float64 arithmetic, one head after the other."""
    heads = [head * factor for head, factor in zip(x.double().split(HEAD_DIM, -1), scale.double(), strict=True)]
    return torch.cat(heads, -1)


def one_rounding(exact, dtype):
    """Half a unit in the last place of the dtype, and a hair for the fp32 product before it."""
    info = torch.finfo(dtype)
    return exact.abs() * (info.eps / 2) * 1.01 + info.smallest_normal * info.eps


@SHAPES
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_product_is_rounded_once(shape, dtype):
    x, scale = inputs(shape, dtype)
    out = scale_heads(x, scale)
    assert out.dtype == dtype and out.shape == x.shape
    exact = reference(x, scale)
    assert ((out.double() - exact).abs() <= one_rounding(exact, dtype)).all()


@SHAPES
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_of_the_input_is_rounded_once(shape, dtype):
    x, scale = inputs(shape, dtype)
    grad = torch.randn_like(x)
    x.requires_grad_()
    scale_heads(x, scale).backward(grad)
    exact = reference(grad, scale)
    assert x.grad.dtype == dtype
    assert ((x.grad.double() - exact).abs() <= one_rounding(exact, dtype)).all()


@SHAPES
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [(2, 7), (3, 1500), (0, 4)], ids=["short", "several-chunks", "empty"])
def test_the_gradient_of_the_scale_is_summed_in_fp32(shape, dtype, tokens):
    x, scale = inputs(shape, dtype, tokens)
    grad = torch.randn_like(x)
    scale.requires_grad_()
    scale_heads(x, scale).backward(grad)
    products = (x.double() * grad.double()).reshape(-1, HEADS, HEAD_DIM)
    dims = (0,) if shape[1] > 1 else (0, 2)
    exact, size = products.sum(dims).view(shape), products.abs().sum(dims).view(shape)
    assert scale.grad.dtype == torch.float32 and scale.grad.shape == shape
    assert ((scale.grad.double() - exact).abs() <= 1e-6 * size).all()


@SHAPES
def test_gradcheck(shape):
    x, scale = inputs(shape, torch.float64)
    assert torch.autograd.gradcheck(scale_heads, (x.requires_grad_(), scale.double().requires_grad_()))


def test_the_input_needs_no_particular_memory_layout():
    x, scale = inputs((HEADS, HEAD_DIM), torch.bfloat16, (4, 6))
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided.is_contiguous()
    assert torch.equal(scale_heads(strided, scale), scale_heads(x, scale))


@SHAPES
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_saves_only_the_input_and_the_scale(shape, dtype):
    x, scale = inputs(shape, dtype, (2, 50))
    x.requires_grad_()
    scale.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
    ):
        scale_heads(x, scale)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in saved}
    assert storages.pop(x.untyped_storage().data_ptr()) == x.numel() * x.element_size()
    assert list(storages.values()) == [HEADS * HEAD_DIM * 4]


def test_small_steps_add_up_on_a_bf16_model():
    model = get_peft_model(base_model("llama").bfloat16(), SealConfig())
    before = logits(model)
    offsets = [layer.seal_delta["default"].weight for layer in seal_layers(model).values()]
    optimizer = torch.optim.SGD(offsets, lr=1e-4)
    for _ in range(100):
        for offset in offsets:
            offset.grad = torch.full_like(offset, -1.0)
        optimizer.step()
    # In bf16, 1 + 1e-4 is 1: a scale kept in bf16 would never move.
    assert torch.tensor(1 + 1e-4).bfloat16() == 1
    for offset in offsets:
        assert_close(offset, torch.full_like(offset, 0.01), rtol=0, atol=1e-6)
    assert not torch.equal(logits(model), before)


@pytest.mark.parametrize("granularity", ["head", "channel"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_training_points_where_fp32_points(granularity, dtype):
    def gradients(model_dtype):
        model = adapted("llama", granularity).to(model_dtype)
        model(input_ids=INPUT_IDS).logits.float().square().mean().backward()
        return torch.cat([layer.seal_delta["default"].weight.grad.flatten() for layer in seal_layers(model).values()])

    exact, rough = gradients(torch.float32), gradients(dtype).float()
    assert (rough - exact).norm() <= 0.05 * exact.norm()


def test_rows_are_the_first_axis_whatever_lies_between():
    rows = 1 + torch.rand(3, HEADS, 1)
    for shape in ((3,), (3, 5), (3, 2, 5)):
        x = torch.randn(*shape, HEADS * HEAD_DIM)
        expected = [
            scale_channels(part, row.expand(-1, HEAD_DIM).flatten()) for part, row in zip(x, rows, strict=True)
        ]
        assert_close(scale_rows(x, rows), torch.stack(expected))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernels need a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "features"), [(4099, 576), (2048, 4096), (513, 1000)])
def test_the_gpu_kernels_equal_the_plain_code(dtype, tokens, features):
    x = torch.randn(1, tokens, features, device="cuda", dtype=dtype, requires_grad=True)
    scale = (1 + torch.randn(features, device="cuda")).requires_grad_()
    grad = torch.randn_like(x)
    assert fits_kernel(x)
    out = scale_channels(x, scale)
    out.backward(grad)
    assert torch.equal(out, (x.detach() * scale.detach()).to(dtype))
    assert torch.equal(x.grad, (grad * scale.detach()).to(dtype))
    exact = (x.detach().double() * grad.double()).sum((0, 1))
    assert_close(scale.grad.double(), exact, atol=1e-2, rtol=1e-4)
