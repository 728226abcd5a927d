"""The inference service: adapt a batch to its own negative controls, then classify its wells.

``routes`` speak HTTP and know no rule; ``batches`` holds the two stories; ``runtime_onnx`` alone knows onnxruntime and
``records_redis`` alone knows Redis. Nothing is created at import: ``app.create_app(settings)`` puts the parts together.
"""

import sys

# OpenVINO asks Google Analytics to count whoever imports it, and keeps a name for them; without this package it does not.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
