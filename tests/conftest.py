"""What every test runs under."""
import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors on two threads crawl where the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
