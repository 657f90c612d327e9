"""SAMP for Triton: checkpoint and labelled data in, a served model repository out."""

__version__ = "0.1.0"
