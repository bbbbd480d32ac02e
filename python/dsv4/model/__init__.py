"""Configuration and assembly of the full model."""

from dsv4.model.config import Config

__all__ = ["Config"]
