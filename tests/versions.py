"""Where the versions that the suite runs on differ (`make test` and `make test-floor`), and until when."""

import pytest
import transformers
from packaging.version import Version

_TRANSFORMERS = Version(transformers.__version__)

# Remove when transformers >= 5.17 is the floor: before, its RoPE update trips over an unset variable.
longrope_per_layer_type = pytest.mark.skipif(
    _TRANSFORMERS < Version("5.17"), reason="transformers' own longrope per layer type fails beyond the native length"
)

# Remove when transformers >= 5.21.1 is the floor: up to 5.19 it runs Gemma 2 with an attention that lacks its softcap.
GEMMA2_HAS_ITS_SOFTCAP = _TRANSFORMERS >= Version("5.21.1")

# Remove when transformers >= 5.13.1 is the floor: up to 5.11 the model asks its cache for linear-attention layers.
QWEN3_NEXT_RUNS_WITHOUT_LINEAR_ATTENTION = _TRANSFORMERS >= Version("5.13.1")
