"""What training and the service must agree on.

Numbers in, numbers out: numpy and an image decoder, no sockets, clocks or GPU. Only ``bundle.py`` reads files and only
``network.py`` knows torch.
"""

import os

# onnxruntime tells its makers of every process, and keeps a name for the machine, unless this is set before it is loaded.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
