"""A real model tuned on a real book: bounds that PyTorch and PEFT set (LoRA r=8 there: 2.41)."""

import pytest

from train.benchmarks import bridge

LORA_PARAMETERS = 46_240


@pytest.mark.shared
@pytest.mark.parametrize(("arm", "bound"), [(bridge.LORA, 2.45), (bridge.GENLORA, 2.52)])
def test_held_out_loss_of_the_bridge(shared, arm, bound):
    result = bridge.ours(shared / "models" / "stories260k", shared / "data" / "grimm.txt", arm)
    assert result["before"] == pytest.approx(3.58, abs=0.03)
    assert result["parameters"] <= LORA_PARAMETERS
    assert result["after"] <= bound
