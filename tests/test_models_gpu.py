"""What needs CUDA: half precision, synchronised batch normalisation, compiled kernels, DDP over NCCL.

Each test runs for every registered head and is skipped, with that reason, where there is no CUDA device.
"""

import pytest
import torch
import torch.distributed as dist
from model_matrix import FIRST, HEADS, Cell
from torch import nn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(params=HEADS)
def model(request):
    return Cell(request.param, FIRST[request.param], "test_resnet", 8, "auxiliary").build().cuda()


@pytest.fixture
def batch():
    labels = torch.randint(0, 3, (2, 70, 97), device="cuda")
    labels[:, :3] = 255
    return torch.randn(2, 3, 70, 97, device="cuda"), labels


@pytest.fixture
def one_process_group(tmp_path):
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def check_step(model, loss):
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_gpu_gives_the_logits_of_the_cpu(model, batch):
    model.double().eval()  # float32 convolutions may run in TF32 there
    pixels = batch[0].double()
    with torch.inference_mode():
        on_gpu = model(pixels).logits.cpu()
        expected = model.cpu()(pixels.cpu()).logits
    assert (on_gpu - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_n4_bfloat16_forward_and_backward(model, batch):
    model.to(torch.bfloat16).train()
    check_step(model, model(batch[0].bfloat16(), batch[1]).loss)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_n4_autocast_forward_and_backward(model, batch, dtype):
    with torch.autocast("cuda", dtype):
        loss = model.train()(*batch).loss
    check_step(model, loss)


def test_n7_compiled_model_takes_other_sizes(model, batch):
    torch.compiler.reset()
    model.eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for pixels in (batch[0], batch[0][:1, :, :45, :61]):
        with torch.no_grad():
            found, expected = compiled(pixels).logits, model(pixels).logits
        assert (found - expected).abs().max() <= 1e-3 * expected.abs().max()  # convolutions in TF32


def test_synchronised_norms_train_as_plain_ones_in_one_process(model, batch, one_process_group):
    for module in model.modules():
        if isinstance(module, (nn.Dropout, nn.Dropout2d)):
            module.p = 0.0
    expected = model.train()(*batch).loss
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(model).train()
    assert any(isinstance(module, nn.SyncBatchNorm) for module in synchronised.modules())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in synchronised.modules())
    loss = synchronised(*batch).loss
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-3)
    check_step(synchronised, loss)


def test_ddp_over_nccl_trains(model, batch, one_process_group):
    parallel = nn.parallel.DistributedDataParallel(model.train(), device_ids=[0])
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    for _ in range(2):  # DDP refuses the second step where a parameter got no gradient in the first
        optimizer.zero_grad()
        check_step(model, parallel(*batch).loss)
        optimizer.step()
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    assert not all(torch.equal(value, before[name]) for name, value in model.named_parameters())
