"""Entry points of ``torch.hub``: ``torch.hub.load("OWNER/freqfusion", "freqfusion", 256, 256)``.

Each takes what the function of the same name in the package takes.
"""

import sys
from pathlib import Path

for folder in ("src", "weights/src"):  # torch.hub downloads, and installs nothing
    sys.path.insert(0, str(Path(__file__).parent / folder))

dependencies = ["torch"]

from freqfusion import FreqFusion as freqfusion  # noqa: E402, F401
from freqfusion import create_fusion, create_model, from_pretrained, load_released  # noqa: E402, F401
