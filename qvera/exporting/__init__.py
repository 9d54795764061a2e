"""Export: a merged 16-bit checkpoint that any tool loads, with a certificate of what was merged onto what."""

from qvera.exporting.merged import export_merged

__all__ = ["export_merged"]
