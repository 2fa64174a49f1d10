import pytest
import torch

from data.errors import UsageError
from pipeline.device import choose_device

WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cuda:-1", "cpu:0", "", "CUDA", "cuda:²"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="expected a device auto, cpu, cuda or cuda:N"):
        choose_device(name)


@WITHOUT_GPU
@pytest.mark.parametrize("name", ["cuda", "cuda:3"])
def test_a_gpu_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"--device {name}: torch .* finds no CUDA device") as caught:
        choose_device(name)
    assert caught.value.exit_code == 2
    assert "--device cpu" in str(caught.value)


@WITHOUT_GPU
def test_auto_is_the_cpu_where_there_is_no_gpu() -> None:
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
