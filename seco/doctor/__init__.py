"""``seco doctor``: what this machine has, what is missing, how to get it."""
