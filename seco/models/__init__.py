"""Networks: backbones, the SeCo model, heads, queue and losses."""
