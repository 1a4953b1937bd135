"""Pre-training, fine-tuning and the SiamFC training over one loop."""
