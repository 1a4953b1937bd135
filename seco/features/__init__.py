"""Feature folders, and feature arrays that may be larger than memory."""
