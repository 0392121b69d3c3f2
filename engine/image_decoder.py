"""The decoder of masked images, which lives in engine/decoders/masked.py."""

from hermesflow.engine.decoders.masked import ImageDecoder, ImageSamplingParams, Progress

__all__ = ["ImageDecoder", "ImageSamplingParams", "Progress", "Watch"]

Watch = Progress  # its former name
