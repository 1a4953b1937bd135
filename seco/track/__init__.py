"""``seco track``: SiamFC on frozen features."""
