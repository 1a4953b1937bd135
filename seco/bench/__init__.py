"""``seco bench``: what the parts cost, beside their physical limits and the plain ways."""
