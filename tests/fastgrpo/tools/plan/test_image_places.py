"""States of a reference image that stand among the text's tokens in the blocks, as planned."""

import math

import pytest

from fastgrpo.core import config
from fastgrpo.models import hunyuan_video_15_i2v
from fastgrpo.tools.plan.costs import compute, memory
from fastgrpo.tools.plan.simulation import rank
from tests import ROOT


@pytest.mark.parametrize("sp", [1, 2])
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
def test_the_plan_counts_the_images_places_in_the_blocks(sp: int) -> None:
    """FLOPs and bytes of the plan's closed forms against a simulated rank's, which counts them."""
    network = dict(hunyuan_video_15_i2v.PUBLISHED)[""] | {
        "num_attention_heads": 2,
        "num_layers": 2,
        "num_refiner_layers": 1,
    }
    overrides = [f"distributed.sp={sp}", "rollout.batch_size=1", "model.cfg=1.0"]
    asked = config.load(ROOT / "launch" / "i2v_hunyuan15.toml", overrides)
    latent, text = (32, 3, 20, 20), 64
    exact = rank.simulate(asked, network, rank.Sizes(latent, text), rank.Ranks(2, 2))
    planned = hunyuan_video_15_i2v.plan(network)
    closed = compute.Job(
        recipe=asked,
        network=planned.network,
        latent=latent,
        video=math.prod(latent[1:]),
        text=text,
        gpus=2,
        ranks_per_node=2,
        replicas=1,
        shards=2,
    )
    # the plan takes every text token for a quoted one, too, so that quoted text has its room
    quoted = sum(
        product.flops for product in planned.network.rest.products if "embedder_2" in product.name
    )
    counted = compute.forward(closed, 1).total - text * quoted
    assert exact.forward_flops == pytest.approx(counted, rel=1e-3)
    sent = compute.micro_batch(closed, 1)
    if sp > 1:
        assert exact.update_sent["all-to-all"] == sent.exchange
    else:  # of so narrow a network, exchanged copies are a tenth, which the plan leaves out
        peak = sum(memory.update(closed, 1, False).values())
        assert exact.update_peak == pytest.approx(peak, rel=0.05)
