"""A compiled model and a captured CUDA graph compute with the noise of the present step."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from peft import PeftModel
from torch import Tensor

from flatlora import FlatLora, FlatLoraConfig, ops
from flatlora.config import Memory

MakeModel = Callable[..., PeftModel]
MakeBatch = Callable[..., dict[str, Tensor]]
pytestmark = [
    pytest.mark.usefixtures("as_users_compile"),
    # torch 2.11's inductor is built on what it deprecates
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty"),  # its manager begins with one
]
STEPS = (0, 3, 4, 5)
MEMORIES: list[Memory] = ["resident", "streamed"]


def run(
    model: PeftModel, forward: Callable[..., Any], memory: Memory, batch: dict[str, Tensor]
) -> tuple[list[float], list[Tensor]]:
    """The losses of some steps, of an evaluation at last, and the gradients of all steps."""
    flat = FlatLora(model, FlatLoraConfig(sigma=0.2, memory=memory), total_steps=10)
    losses, gradients = [], []
    for step in STEPS:
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        with flat.perturbed(step):
            loss = forward(**batch).loss
            loss.backward()
        losses.append(float(loss.detach()))
        gradients += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad(set_to_none=True)
        del loss
    torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
    losses.append(float(forward(**batch).loss.detach()))
    return losses, gradients


@pytest.mark.parametrize("memory", MEMORIES)
def test_a_compiled_model_is_compiled_once_clean_and_once_noisy(
    peft_model: MakeModel, make_batch: MakeBatch, memory: Memory
) -> None:
    plain = peft_model()
    expected = run(plain, plain, memory, make_batch())
    model, graphs = peft_model(), torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    losses, gradients = run(model, compiled, memory, make_batch())
    assert graphs.frame_count == 2
    assert losses == pytest.approx(expected[0], rel=1e-6)
    assert losses[0] == losses[-1]
    assert len(set(losses[:-1])) == len(STEPS)  # every step has noise of its own
    for found, wanted in zip(gradients, expected[1], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("memory", MEMORIES)
def test_a_compiled_model_is_clean_where_its_adapter_is_disabled_in_the_block(
    peft_model: MakeModel, make_batch: MakeBatch, memory: Memory
) -> None:
    model = peft_model()

    def loss(forward: Callable[..., Any]) -> float:
        return float(forward(**make_batch()).loss.detach())

    with model.disable_adapter():
        expected = loss(model)
    flat = FlatLora(model, FlatLoraConfig(sigma=0.2, memory=memory), total_steps=10)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with flat.perturbed(3):
        noisy = loss(model)
        assert loss(compiled) == pytest.approx(noisy, rel=1e-6)
        with model.disable_adapter():
            assert loss(compiled) == pytest.approx(expected, rel=1e-6)
        assert loss(compiled) == pytest.approx(noisy, rel=1e-6)
    assert noisy != pytest.approx(expected, rel=1e-6)


def test_the_operators_keep_the_contract_of_torch_library(
    peft_model: MakeModel, make_batch: MakeBatch
) -> None:
    model = peft_model()
    flat = FlatLora(model, FlatLoraConfig(sigma=0.1, memory="streamed"), total_steps=4)
    with flat.perturbed(2):
        forward: Any = vars(flat.targets[0].base)["forward"]
        noise = forward.noise
        x = torch.randn(3, 5, flat.targets[0].in_features, requires_grad=True)
        weight = flat.targets[0].weight
        bias = torch.randn(weight.shape[0], requires_grad=True)
        torch.library.opcheck(
            torch.ops.flatlora.noisy_linear.default,
            (x, weight, bias, noise.std, noise.clock, forward._layer),
        )
        out, clock = torch.empty_like(weight), ops.clock_of(ops.Stream((1, 2), 3, 4), weight.device)
        torch.library.opcheck(
            torch.ops.flatlora.noisy_copy.default, (weight.detach(), noise.std, 1, 2, clock, out)
        )


@pytest.mark.gpu
@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_inductor_and_its_cuda_graphs_draw_anew_at_each_step(
    peft_model: MakeModel, make_batch: MakeBatch, memory: Memory, mode: str
) -> None:
    batch = {name: tensor.cuda() for name, tensor in make_batch().items()}
    plain = peft_model().cuda()
    expected = run(plain, plain, memory, batch)
    model = peft_model().cuda()
    losses, gradients = run(model, torch.compile(model, mode=mode), memory, batch)
    assert losses == pytest.approx(expected[0], rel=1e-4)
    for found, wanted in zip(gradients, expected[1], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("memory", MEMORIES)
def test_a_captured_graph_replays_with_the_noise_of_the_present_step(
    peft_model: MakeModel, make_batch: MakeBatch, memory: Memory
) -> None:
    batch = {name: tensor.cuda() for name, tensor in make_batch().items()}
    model = peft_model("wide", dtype=torch.bfloat16).cuda()
    flat = FlatLora(model, FlatLoraConfig(sigma=0.2, memory=memory), total_steps=10)

    def forward_backward() -> Tensor:
        model.zero_grad(set_to_none=False)
        loss: Tensor = model(**batch).loss
        torch.autograd.backward(loss)
        return loss.detach()

    with flat.perturbed(3):
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(side):
            for _ in range(3):
                forward_backward()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = forward_backward()
    for step in (3, 7, 4):
        with flat.perturbed(step):
            graph.replay()
            found = captured.clone(), [p.grad.clone() for p in _trained(model)]
            wanted = forward_backward(), [p.grad.clone() for p in _trained(model)]
        assert torch.equal(found[0], wanted[0])
        assert all(map(torch.equal, found[1], wanted[1]))


def _trained(model: PeftModel) -> list[Any]:
    return [p for p in model.parameters() if p.grad is not None]
