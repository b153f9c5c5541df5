"""What makes a plain graph fast on ONNX Runtime's CPU. Each rule is a file with its formula; this is their order."""

from ldm_export.graph.cpu.attention import FuseAttention
from ldm_export.graph.cpu.gated import SplitGated
from ldm_export.graph.cpu.pointwise import PointwiseToProduct
from ldm_export.graph.cpu.rule import Rule
from ldm_export.graph.cpu.upsample import FoldUpsample

RULES: tuple[Rule, ...] = (FuseAttention(), PointwiseToProduct(), SplitGated(), FoldUpsample())
