"""Adapters as people share them: LoRA, LoHa, LoKr and DoRA, read from files and added to weights, without torch."""

from ldm_export.adapters.factors import Factors, merged
from ldm_export.adapters.names import Layer, Networks
from ldm_export.adapters.reader import Adapter, read_adapter

__all__ = ["Adapter", "Factors", "Layer", "Networks", "merged", "read_adapter"]
