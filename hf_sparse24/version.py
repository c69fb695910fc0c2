"""The version, in one place: read by the build, by the package and by every checkpoint that is written."""

__version__ = "0.1.0"
