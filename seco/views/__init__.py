"""The views of a frame: decode, crop, resize, jitter, blur, flip, normalise (paper §5.1)."""
