"""Take a latent diffusion model trained in PyTorch and make it something an application can ship.

Nothing here reports to anybody. Libraries that would by default are switched off as this package is imported, before
theirs are: ONNX Runtime, which from 1.29 on sends events and leaves a device id in the user's cache, by
``ORT_DISABLE_TELEMETRY=1`` in the environment, which processes that are started here inherit. OpenVINO's is kept out
where that is imported (``ldm_export.runtime.backends.openvino``).
"""

import os

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # other values, 0 and the empty one among them, would leave it on

__version__ = "0.1.0"
