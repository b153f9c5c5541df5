"""The bundle on disk: its manifest, its files as they are listed, and what is made of it for one kind of machine."""

from ldm_export.bundle.bundle import Bundle, BundleWriter, create_bundle, export_error
from ldm_export.bundle.manifest import Manifest
from ldm_export.reading.json_fields import FileEntry

__all__ = ["Bundle", "BundleWriter", "FileEntry", "Manifest", "create_bundle", "export_error"]
