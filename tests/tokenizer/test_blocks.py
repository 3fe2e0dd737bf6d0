import pytest
import torch
import torch.nn.functional as F

from graincode.tokenizer.blocks import norm


@pytest.mark.parametrize("channels", [8, 32, 64, 512])
def test_group_norm_is_torchs_in_any_memory_layout(channels):
    layer, x = norm(channels), torch.randn(2, channels, 4, 6).to(memory_format=torch.channels_last)
    expected = F.group_norm(x.double(), layer.num_groups, eps=1e-6).float()
    torch.testing.assert_close(layer(x), expected)
    assert layer(x).is_contiguous(memory_format=torch.channels_last)
