"""nestnet: virtual networks all the way down."""

__version__ = "0.1.0"
