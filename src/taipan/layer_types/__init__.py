"""The layer types in numbers, and which names configurations may use for them."""

from taipan.layer_types.attention import AttentionTable, SelectiveAttentionTable
from taipan.layer_types.mamba2 import Mamba2Table
from taipan.layer_types.table import LayerTable, Matrix, register_table, table_of, tables, unregister_table

__all__ = ["LayerTable", "Matrix", "register_own", "register_table", "table_of", "tables", "unregister_table"]


def register_own() -> None:
    """Enter the layer types of this package; `import taipan` does, so that they are known before any configuration."""
    register_table("mamba2", Mamba2Table())
    register_table("selective_attention", SelectiveAttentionTable())
    register_table("full_attention", AttentionTable(windowed=False))
    register_table("sliding_attention", AttentionTable(windowed=True))
