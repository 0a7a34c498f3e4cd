"""Where the versions that the suite runs on differ (`make test` and `make test-floor`), and until when."""

import pytest
import transformers
from packaging.version import Version

_TRANSFORMERS = Version(transformers.__version__)

# Remove when transformers >= 5.17 is the floor: before, its RoPE update trips over an unset variable.
longrope_per_layer_type = pytest.mark.skipif(
    _TRANSFORMERS < Version("5.17"), reason="transformers' own longrope per layer type fails beyond the native length"
)
